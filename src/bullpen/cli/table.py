"""The table of ``bullpen ps``: as many columns as the terminal is wide enough for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.table import Table
from rich.text import Text

from bullpen.cli import words
from bullpen.client import Instance

GAP = 2


def state(instance: Instance, now: datetime) -> str:
    """The state; of a start how far it has come, of an end how it ended."""
    if instance.state == "starting":
        return f"starting {100 * (instance.progress or 0.0):.0f}%"
    if instance.ended and instance.exit_code:
        return f"{instance.state} ({instance.exit_code})"
    return instance.state


def phase(instance: Instance, now: datetime) -> str:
    """What it is doing while it starts."""
    return words.phase(instance.phase or "start") if instance.state == "starting" else ""


def age(instance: Instance, now: datetime) -> str:
    """How long ago it was asked for."""
    return words.age((now - instance.created).total_seconds()) if instance.created else ""


def start(instance: Instance, now: datetime) -> str:
    """How its process was made, and how long it took to be ready."""
    seconds = instance.seconds_to_ready
    return f"{instance.start or ''} {words.duration(seconds) if seconds is not None else ''}".strip()


def url(instance: Instance, now: datetime) -> str:
    """Where it answers; nowhere any more when it has ended."""
    return "" if instance.ended else instance.url or ""


def pid(instance: Instance, now: datetime) -> str:
    """Its process; by now another program may have the number of one that has ended."""
    return "" if instance.ended else str(instance.pid or "")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        cell: what it says of an instance at a time.
        rank: 0 is always shown; of the others the highest goes first where there is no room.
        narrow: characters that are left at least where its cells are shortened; None: they never are.
    """

    heading: str
    cell: Callable[[Instance, datetime], str]
    rank: int = 0
    narrow: int | None = None
    right: bool = False


COLUMNS = (
    Column("ID", lambda instance, now: instance.instance_id, narrow=24),
    Column("MODEL", lambda instance, now: instance.model or "?", narrow=18),
    Column("STATE", state),
    Column("PHASE", phase, rank=3),
    Column("URL", url, rank=1),
    Column("AGE", age, rank=2, right=True),
    Column("START", start, rank=4),
    Column("PID", pid, rank=5, right=True),
    Column("ENGINE", lambda instance, now: instance.engine, rank=6),
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


def layout(instances: Sequence[Instance], now: datetime, width: int | None) -> list[Filled]:
    """The columns that fit ``width``, and how wide each is; None: all of them, nothing cut."""
    filled = []
    for column in COLUMNS:
        cells = [column.cell(instance, now) for instance in instances]
        if any(cells):
            filled.append(Filled(column, cells, max(map(len, [column.heading, *cells]))))
    if width is None:
        return filled
    while room(filled, width) < sum(one.narrowest for one in filled) and any(one.column.rank for one in filled):
        filled.remove(max(filled, key=lambda one: one.column.rank))
    for one in reversed(filled):  # the model gives way before the id
        surplus = sum(other.width for other in filled) - room(filled, width)
        one.width = max(one.narrowest, one.width - max(0, surplus))
    return filled


def room(filled: Sequence[Filled], width: int) -> int:
    """What the gaps between columns leave of a width."""
    return width - GAP * (len(filled) - 1)


def instance_table(instances: Sequence[Instance], now: datetime, width: int | None) -> Table:
    """The instances as a table that fits ``width``; None: all columns, nothing cut."""
    filled = layout(instances, now, width)
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
