"""The display of a swap: live on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bullpen.cli import words
from bullpen.cli.display import LiveDisplay
from bullpen.client import Event, Instance, Swap, Swapped

STAGES: Mapping[str, str] = {"out": "out", "in": "in", "back": "put back"}
"""The stages that take time, as people read them."""


class SwapDisplay(LiveDisplay):
    """Shows how a swap goes on; `update` may be called by another thread.

    Args:
        console: where; animated if it is a terminal.
        incoming: the id of what comes in.
        outgoing: what goes out, as far as that is known.
        was_ready: what comes in was ready before.
    """

    def __init__(self, console: Console, incoming: str, outgoing: Sequence[str], *, was_ready: bool = False) -> None:
        self._incoming = incoming
        self._outgoing = list(outgoing)
        self._was_ready = was_ready
        self._swap: Swap | None = None
        self._instances: dict[str, Instance] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._begun = self._stage_begun = time.monotonic()
        self._over = False
        self._spinner = Spinner("dots", style="cyan")
        super().__init__(console)

    def update(self, event: Event) -> None:
        """Take in what has happened; other swaps and other instances do not matter."""
        with self._lock:
            if event.swap is not None and event.swap.incoming == self._incoming:
                self._take(event.swap)
            elif event.instance is not None:
                self._instances[event.instance.instance_id] = event.instance

    def _take(self, swap: Swap) -> None:
        if self._swap is None or swap.stage != self._swap.stage:
            self._stage_begun = time.monotonic()
        self._swap, self._outgoing = swap, swap.outgoing
        if swap.stage in STAGES:
            self._tell(f"{self._who(swap.stage)}{f': {swap.error}' if swap.error else ''}")

    def done(self, swapped: Swapped) -> None:
        """Leave the summary of a swap that has come to a good end."""
        with self._lock:
            self._over = True
        if self._live is not None:
            self._live.stop()
        heading = Text.assemble(("✓ ", "green"), (swapped.incoming.instance_id, "bold"))
        if self._was_ready and not swapped.outgoing:
            self._console.print(heading.append(" is ready already, nothing had to go"))
            return
        self._console.print(heading.append(f" is ready in {words.duration(swapped.seconds)}"))
        asleep = [f"{one.instance_id} {words.has_become(one)}" for one in swapped.outgoing]
        times = stage_times(swapped.stages, swapped.seconds)
        taken = ", ".join(f"{STAGES[stage]} {words.duration(seconds)}" for stage, seconds in times)
        self._console.print(Text(f"  {taken}{'; ' if asleep else ''}{', '.join(asleep)}", "dim"))

    def _tell(self, line: str) -> None:
        if self._live is None and not self._over and line not in self._told:
            self._told.add(line)
            self._console.print(line, soft_wrap=True)

    def _who(self, stage: str) -> str:
        out = ", ".join(self._outgoing)
        if stage == "out":
            return f"out: {out or 'nothing has to go'}"
        return f"in: {self._incoming}" if stage == "in" else f"put back: {out or self._incoming}"

    def _render(self) -> RenderableType:
        with self._lock:
            now = time.monotonic()
            heading = Text.assemble(
                (self._incoming, "bold"), " comes in  ", (words.duration(now - self._begun), "cyan")
            )
            self._spinner.update(text=heading)
            return Group(self._spinner, self._stages(now))

    def _stages(self, now: float) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(justify="right")
        table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
        swap = self._swap
        if swap is None:
            return table
        begun = stage_times(swap.stages, None)
        for stage, seconds in begun:
            current = stage == swap.stage
            mark = Text("▸", "cyan") if current else Text("✓", "green")
            taken = now - self._stage_begun if current else seconds
            detail = self._doing(stage) if current else ""
            table.add_row(
                " ", mark, self._who(stage), Text(words.duration(taken), "cyan" if current else "dim"), detail
            )
        if swap.error:
            table.add_row(" ", Text("!", "yellow"), Text(swap.error, "yellow"))
        return table

    def _doing(self, stage: str) -> str:
        """What those do that a stage is about."""
        about = [self._incoming] if stage == "in" else self._outgoing
        known = [self._instances[one] for one in about if one in self._instances]
        return ", ".join(filter(None, map(describe, known)))


def describe(instance: Instance) -> str:
    """What an instance does just now."""
    if instance.state == "starting" and instance.phase not in (None, "waiting"):
        left = words.time_left(instance.remaining_seconds)
        return f"{words.phase(instance.phase or 'start')} {100 * (instance.progress or 0.0):.0f} %  {left}".rstrip()
    return words.doing(instance)


def stage_times(begun: Mapping[str, float], until: float | None) -> list[tuple[str, float]]:
    """Each stage that takes time with its length in seconds; the last one has lasted ``until`` now, where given."""
    steps = sorted(begun.items(), key=lambda step: step[1])
    last = steps[-1][1] if until is None and steps else until or 0.0
    ends = [*(at for _, at in steps), last][1:]
    return [(stage, max(0.0, end - at)) for (stage, at), end in zip(steps, ends, strict=True) if stage in STAGES]
