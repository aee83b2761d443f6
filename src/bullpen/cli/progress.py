"""The display of a start: live on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bullpen.cli import words
from bullpen.cli.display import LiveDisplay
from bullpen.client import Instance, Readiness, ZygoteState

BAR_WIDTH = 36
IDLE_FRAMES_PER_SECOND = 1.0
"""When only the time goes on: someone may look at it for hours."""


class StartDisplay(LiveDisplay):
    """Shows how an instance comes up, and then how it is.

    Args:
        console: where; animated if it is a terminal.
        name: the instance's id.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._spinner = Spinner("dots", style="cyan")
        self._asked_at = time.monotonic()
        self._zygote: ZygoteState | None = None
        self._instance: Instance | None = None
        self._origin = self._asked_at
        self._expected_at: float | None = None
        self._told: set[str] = set()
        super().__init__(console)

    def rename(self, name: str) -> None:
        """Show another id."""
        self._name = name

    def warming(self, readiness: Readiness) -> None:
        """The create waits: show how far its engine is."""
        zygotes = readiness.zygotes
        self._zygote = next((one for one in zygotes if one.engine == readiness.engine), next(iter(zygotes), None))
        if self._zygote is not None and self._zygote.state == "warming":
            self._tell(f"{self._name} waits: engine {self._zygote.engine} is being imported")

    def update(self, instance: Instance) -> None:
        """Show an instance as it is now."""
        if self._instance is None or instance.phases != self._instance.phases:
            # The daemon's clock counts from the start; the newest phase began just now on ours.
            self._origin = time.monotonic() - max(instance.phases.values(), default=0.0)
        left = instance.remaining_seconds
        self._expected_at = None if left is None else time.monotonic() + left
        self._instance = instance
        if instance.state == "starting" and instance.phase and instance.phase != "ready":
            waits = (words.doing(instance) or "waits") if instance.phase == "waiting" else ""
            self._tell(f"{self._name}: {waits or words.phase(instance.phase)}")
        elif instance.state not in ("starting", "ready"):
            self._tell(f"{self._name} {words.has_become(instance)}")

    def ready(self, instance: Instance, *parts: RenderableType) -> None:
        """Leave the summary of a start that has come to its end, and ``parts`` below it; then show how it is."""
        if self._live is not None:
            self._live.stop()
        self.update(instance)
        total = instance.seconds_to_ready or 0.0
        heading = Text.assemble(("✓ ", "green"), (self._name, "bold"), f" is ready in {words.duration(total)}")
        made = words.how_made(instance.start)
        self._console.print(heading.append(f", {made}" if made else ""))
        if self._live is not None:  # elsewhere each phase has had its line
            self._console.print(phase_table(instance, total))
        self._print(*parts)
        if self._live is not None:
            self._live = self._new_live(IDLE_FRAMES_PER_SECOND)
            self._live.start()

    def _print(self, *parts: RenderableType) -> None:
        for part in parts:
            self._console.print(part, soft_wrap=True)

    def _tell(self, line: str) -> None:
        if self._live is None and line not in self._told:
            self._told.add(line)
            self._print(line)

    def _render(self) -> RenderableType:
        now = time.monotonic()
        instance = self._instance
        if instance is None:
            return self._render_waiting(now - self._asked_at)
        if instance.state != "starting":
            return self._render_state(instance)
        elapsed = now - self._origin
        left = words.time_left(None if self._expected_at is None else self._expected_at - now)
        return Group(
            self._heading(
                (words.doing(instance) or "waits") if instance.phase == "waiting" else "is starting", elapsed
            ),
            bar(instance.progress or 0.0, f"{100 * (instance.progress or 0.0):.0f} %  {left}"),
            phase_table(instance, elapsed, running=True),
        )

    def _render_waiting(self, elapsed: float) -> RenderableType:
        zygote = self._zygote
        if zygote is None or zygote.state != "warming":
            return self._heading("is being started", elapsed)
        heading = self._heading(f"waits for engine {zygote.engine}, which is being imported", elapsed)
        if not zygote.total:
            return heading
        module = words.shorten(zygote.module or "", max(0, self._console.width - BAR_WIDTH - 16))
        return Group(heading, bar(zygote.done / zygote.total, f"{zygote.done}/{zygote.total}  {module}"))

    def _heading(self, what: str, seconds: float) -> RenderableType:
        self._spinner.update(text=Text.assemble((self._name, "bold"), f" {what}  ", (words.duration(seconds), "cyan")))
        return self._spinner

    def _render_state(self, instance: Instance) -> RenderableType:
        colour = words.COLOURS.get(instance.state, "")
        how_long = f" for {words.age(since(instance))}" if instance.state == "ready" else ""
        line = Text.assemble(("● ", colour), (self._name, "bold"), " is ", (words.state(instance), colour), how_long)
        return line.append("  Ctrl-C offers to stop it", "dim")


def since(instance: Instance) -> float:
    """Seconds since an instance became ready."""
    begin = datetime.fromisoformat(instance.ready_at) if instance.ready_at else datetime.now(UTC)
    return max(0.0, (datetime.now(UTC) - begin).total_seconds())


def bar(fraction: float, text: str) -> Table:
    """A progress bar with a text behind it."""
    line = Table.grid(padding=(0, 1))
    line.add_row(" ", ProgressBar(total=1.0, completed=fraction, width=BAR_WIDTH), Text(text, "dim", no_wrap=True))
    return line


def phase_table(instance: Instance, until: float, *, running: bool = False) -> Table:
    """The phases of a start with their times; while it is ``running`` the last one has no end yet."""
    table = Table.grid(padding=(0, 1))
    durations = words.phase_durations(instance.phases, until)
    for number, (name, seconds) in enumerate(durations, 1):
        current = running and number == len(durations)
        mark = Text("▸", "cyan") if current else Text("✓", "green")
        table.add_row(" ", mark, name, Text(words.duration(seconds), "cyan" if current else "dim", justify="right"))
    return table
