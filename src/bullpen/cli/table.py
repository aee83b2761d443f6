"""The table of ``bullpen ps``: as many columns as the terminal is wide enough for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from rich.table import Table
from rich.text import Text

from bullpen.cli import gpus, words
from bullpen.client import Instance

GAP = 2


@dataclass(frozen=True)
class Context:
    """What a table needs to know besides the instances: the time, and the index of each GPU by its UUID."""

    now: datetime
    index: Mapping[str, int] = field(default_factory=dict)


def state(instance: Instance, context: Context) -> str:
    """The state; of a start how far it has come, of a sleep how deep it is, of an end how it ended."""
    if instance.state == "starting" and instance.phase == "waiting":
        return "waiting"
    if instance.state == "starting":
        return f"starting {100 * (instance.progress or 0.0):.0f}%"
    if instance.ended and instance.exit_code:
        return f"{instance.state} ({instance.exit_code})"
    return words.state(instance)


def gpu_indices(instance: Instance, context: Context) -> str:
    """The GPUs that are its own, awake or asleep."""
    return gpus.numbers(instance, context.index)


def gpu_memory(instance: Instance, context: Context) -> str:
    """What it holds on each of them, in MiB."""
    held = gpus.memory(instance).gpu_mib
    return "" if held is None else str(held)


def phase(instance: Instance, context: Context) -> str:
    """What it is doing, or waits for."""
    if instance.state == "starting" and instance.phase not in (None, "waiting"):
        return words.phase(instance.phase or "start")
    return words.doing(instance)


def age(instance: Instance, context: Context) -> str:
    """How long ago it was asked for."""
    return words.age((context.now - instance.created).total_seconds()) if instance.created else ""


def start(instance: Instance, context: Context) -> str:
    """How its process was made, and how long it took to be ready."""
    seconds = instance.seconds_to_ready
    return f"{instance.start or ''} {words.duration(seconds) if seconds is not None else ''}".strip()


def url(instance: Instance, context: Context) -> str:
    """Where it answers; nowhere any more when it has ended."""
    return "" if instance.ended else instance.url or ""


def pid(instance: Instance, context: Context) -> str:
    """Its process; by now another program may have the number of one that has ended."""
    return "" if instance.ended or instance.sleep_emulated else str(instance.pid or "")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        cell: what it says of an instance.
        rank: 0 is always shown; the others, beginning with the lowest, as far as there is room.
        narrow: characters that are left at least where its cells are shortened; None: they never are.
    """

    heading: str
    cell: Callable[[Instance, Context], str]
    rank: int = 0
    narrow: int | None = None
    right: bool = False


COLUMNS = (
    Column("ID", lambda instance, context: instance.instance_id, narrow=24),
    Column("MODEL", lambda instance, context: instance.model or "?", narrow=18),
    Column("STATE", state),
    Column("GPU", gpu_indices, rank=1),
    Column("GPU MiB", gpu_memory, rank=3, right=True),
    Column("PHASE", phase, rank=5),
    Column("URL", url, rank=2),
    Column("AGE", age, rank=4, right=True),
    Column("START", start, rank=6),
    Column("PID", pid, rank=7, right=True),
    Column("ENGINE", lambda instance, context: instance.engine, rank=8),
)


@dataclass
class Filled:
    """A column with its cells and the width that it gets."""

    column: Column
    cells: list[str]
    width: int

    @property
    def narrowest(self) -> int:
        """How narrow it may become."""
        return self.width if self.column.narrow is None else min(self.width, self.column.narrow)


def layout(
    instances: Sequence[Instance], context: Context, width: int | None, columns: Sequence[Column] = COLUMNS
) -> list[Filled]:
    """The ``columns`` that fit ``width``, and how wide each is; None: all of them, nothing cut."""
    filled = []
    for column in columns:
        cells = [column.cell(instance, context) for instance in instances]
        if any(cells):
            filled.append(Filled(column, cells, max(map(len, [column.heading, *cells]))))
    if width is None:
        return filled
    chosen: list[Filled] = []
    for one in sorted(filled, key=lambda one: one.column.rank):
        wider = [*chosen, one]
        if one.column.rank == 0 or sum(other.narrowest for other in wider) <= room(wider, width):
            chosen = wider
    filled = [one for one in filled if one in chosen]
    for one in reversed(filled):  # the model gives way before the id
        surplus = sum(other.width for other in filled) - room(filled, width)
        one.width = max(one.narrowest, one.width - max(0, surplus))
    return filled


def room(filled: Sequence[Filled], width: int) -> int:
    """What the gaps between columns leave of a width."""
    return width - GAP * (len(filled) - 1)


def instance_table(instances: Sequence[Instance], context: Context, width: int | None) -> Table:
    """The instances as a table that fits ``width``; None: all columns, nothing cut."""
    filled = layout(instances, context, width)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for one in filled:
        table.add_column(one.column.heading, justify="right" if one.column.right else "left", min_width=one.width)
    for row, instance in enumerate(instances):
        table.add_row(
            *(
                Text(
                    words.shorten(one.cells[row], one.width),
                    words.COLOURS.get(instance.state, "") if one.column.heading == "STATE" else "",
                    no_wrap=True,
                )
                for one in filled
            )
        )
    return table
