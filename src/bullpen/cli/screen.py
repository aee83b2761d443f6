"""What ``bullpen top`` shows: one frame from what is known at a moment. No I/O."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from bullpen.cli import gpus, words
from bullpen.cli.table import COLUMNS, GAP, Context, Filled, layout
from bullpen.client import Gpu, GpuReport, Instance, InstanceList, Readiness

SHOWN = ("ID", "MODEL", "STATE", "GPU", "GPU MiB", "AGE", "START")
"""The columns of instances."""
FULL, EMPTY = "█", "░"
WIDE = 100
"""From so many characters on, bars are longer and the names of GPUs whole."""


@dataclass(frozen=True)
class Snapshot:
    """What a daemon told at a moment; ``trouble``: why there is nothing newer."""

    url: str
    found: InstanceList
    report: GpuReport
    readiness: Readiness
    trouble: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return {"instances": self.found.document.get("instances", []), **self.report.document}


def frame(snapshot: Snapshot, now: datetime, width: int, height: int | None = None) -> RenderableType:
    """The whole view, in at most ``height`` lines; None: as many as it takes."""
    instances = snapshot.found.instances
    above = [*heading(snapshot, instances, width), Text()]
    above += [*gpu_lines(snapshot.report, width), Text()]
    waiting = words.launching(snapshot.readiness)
    above += [Text(cut(line, width), "cyan", no_wrap=True) for line in waiting]
    room = None if height is None else height - len(above) - 1
    below = [Text(cut(f"! {snapshot.trouble}", width), "red")] if snapshot.trouble else []
    context = Context(now, gpus.indices(snapshot.report))
    if not instances and snapshot.readiness.waiting:
        return Group(*above, *below)
    return Group(
        *above, *instance_lines(instances, context, width, None if room is None else room - len(below)), *below
    )


def heading(snapshot: Snapshot, instances: Sequence[Instance], width: int) -> list[Text]:
    """Which daemon, how many instances in which state, how much host memory sleepers keep."""
    states = Counter(instance.state for instance in instances)
    counted = ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "no instances"
    host = snapshot.report.host
    allowed = "" if host.budget_mib is None else f" of {words.mib(host.budget_mib)}"
    free = "" if host.available_mib is None else f", {words.mib(host.available_mib)} free"
    first = Text.assemble(("bullpen", "bold"), f"  {snapshot.url}  {counted}", no_wrap=True)
    first.truncate(width, overflow="ellipsis")
    memory = f"host memory: {words.mib(host.asleep_mib)}{allowed} kept by sleepers{free}"
    return [first, Text(cut(memory, width), "dim", no_wrap=True)]


# -- GPUs ------------------------------------------------------------------------------------------------------------


def gpu_lines(report: GpuReport, width: int) -> list[Text]:
    """Each GPU: how much of it is used, by whom, and who sleeps there; then what is not as it should be."""
    if not report.gpus:
        return [Text("No GPUs: servers run on the CPU.", "dim")]
    wide = width >= WIDE
    rows = [("GPU", "NAME", "MEMORY", "", "AWAKE", "ASLEEP")]
    rows += [gpu_row(gpu, wide) for gpu in report.gpus]
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    rest = max(12, width - sum(widths) - GAP * 5)
    awake = min(max(len(row[4]) for row in rows), max(rest // 2, rest - max(len(row[5]) for row in rows)))
    lines: list[Text] = []
    for row in rows:
        cells = [cell.ljust(size) for cell, size in zip(row, [*widths, awake], strict=False)]
        cells[4] = cut(row[4], awake).ljust(awake)
        line = (" " * GAP).join([*cells, row[5]])
        lines.append(Text(cut(line, width).rstrip(), "" if lines else "bold", no_wrap=True))
    return [*lines, *(Text(cut(line, width), "yellow", no_wrap=True) for line in gpus.troubles(report))]


def gpu_row(gpu: Gpu, wide: bool) -> tuple[str, str, str, str, str, str]:
    """What there is to say about a GPU."""
    label = str(gpu.index) if gpu.parent is None else words.shorten(gpu.uuid, 12)
    called = gpu.name.removeprefix("NVIDIA ")
    coming = f"{gpus.claims(gpu.coming)} (coming)" if gpu.coming else ""
    busy = ", ".join(filter(None, [gpus.claims(gpu.awake), coming]))
    bar, used = memory_bar(gpu, 24 if wide else 10)
    return (
        label,
        called if wide else words.shorten(called, 10),
        bar,
        used,
        busy or "-",
        gpus.claims(gpu.asleep) or "-",
    )


def memory_bar(gpu: Gpu, length: int) -> tuple[str, str]:
    """How full a GPU is: as a bar, and in GiB."""
    total = f"{gpu.memory_mib / 1024:.1f} GiB"
    if gpu.free_mib is None:
        return "?" * length, f"?/{total}"
    used = max(0, gpu.memory_mib - gpu.free_mib)
    full = min(length, math.ceil(length * used / gpu.memory_mib)) if gpu.memory_mib else 0
    return FULL * full + EMPTY * (length - full), f"{used / 1024:.1f}/{total}"


# -- instances -------------------------------------------------------------------------------------------------------


def instance_lines(instances: Sequence[Instance], context: Context, width: int, room: int | None) -> list[Text]:
    """A line for each instance, and one below it that says why it is so, as far as there is room."""
    if not instances:
        return [Text("No instances. `bullpen run MODEL` starts one.", "dim")]
    columns = [column for column in COLUMNS if column.heading in SHOWN]
    filled = layout(instances, context, width, columns)
    lines = [row_line(filled, [one.column.heading for one in filled])]
    lines[0].stylize("bold")
    whys = [why(instance) for instance in instances]
    if room is not None and 1 + len(instances) + sum(map(bool, whys)) > room:
        whys = [""] * len(instances)
    for row, instance in enumerate(instances):
        colour = words.COLOURS.get(instance.state, "")
        lines.append(row_line(filled, [one.cells[row] for one in filled], colour))
        if whys[row]:
            lines.append(Text(cut(f"  └ {whys[row]}", width), "dim", no_wrap=True))
    if room is not None and len(lines) > room:
        shown = max(1, room - 1)
        hidden = len(lines) - shown
        return [*lines[:shown], Text(f"… and {hidden} more; a taller terminal shows them", "dim")]
    return lines


def row_line(filled: Sequence[Filled], cells: Sequence[str], colour: str = "") -> Text:
    """One line of the table; the state in its colour."""
    line = Text(no_wrap=True)
    for one, cell in zip(filled, cells, strict=True):
        text = words.shorten(cell, one.width)
        text = text.rjust(one.width) if one.column.right else text.ljust(one.width)
        line.append(f"{text}{' ' * GAP}", colour if one.column.heading == "STATE" else "")
    line.rstrip()
    return line


def why(instance: Instance) -> str:
    """What an instance does or waits for, or else what was decided about it last."""
    if instance.error is not None:
        return instance.error.message
    if instance.state == "starting" and instance.phase not in (None, "waiting"):
        left = words.time_left(instance.remaining_seconds)
        return ", ".join(filter(None, [words.phase(instance.phase or "start"), left]))
    if instance.activity is not None:
        return f"{instance.activity.doing}: {words.doing(instance)} ({instance.activity.reason})"
    return instance.reason or ""


def cut(text: str, width: int) -> str:
    """A text at most so wide; of a sentence the beginning says most, so the end goes."""
    return text if len(text) <= width else text[: max(0, width - 1)] + words.ELLIPSIS
