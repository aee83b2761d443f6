"""What all benchmarks share: their options, the shape of a result, a little statistics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class BenchError(Exception):
    """A benchmark cannot go on; the text says what happened and where to look."""


class UnavailableError(Exception):
    """This machine cannot run a benchmark; the text says what is missing."""


@dataclass(frozen=True)
class Options:
    """How to run: ``quick`` for a look with fewer runs; ``folder`` is temporary, ``models`` a cache that stays.

    ``gpu_models`` are those that the benchmarks on a GPU serve: folders, or names in the local cache of models.
    """

    quick: bool
    folder: Path
    models: Path
    gpu_models: tuple[str, ...] = ()


class Progress(Protocol):
    """Tells the user how far a benchmark is."""

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""

    def step(self, what: str) -> None:
        """Begin a step."""


@dataclass
class Table:
    """Rows that were measured in one run, so that they compare."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Goal:
    """What a figure must reach, and what it is."""

    what: str
    limit: str
    measured: str
    reached: bool


@dataclass
class Result:
    """What a benchmark found. ``data`` holds every single measurement, in seconds and bytes."""

    title: str
    method: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """How steep the straight line is that fits the points best."""
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def spread(values: Sequence[float], unit: str = "s") -> str:
    """Median, smallest and largest, as ``0.61 s (0.55 to 0.70)``; the values are in seconds for ``s`` and ``ms``."""
    scale = 1000.0 if unit == "ms" else 1.0
    middle, low, high = (number(value * scale) for value in (median(values), min(values), max(values)))
    return f"{middle} {unit}" if len(values) == 1 else f"{middle} {unit} ({low} to {high})"


def number(value: float) -> str:
    """A number with three digits that count, and no fewer than it has before the point."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"


def ratio(part: float, whole: float) -> str:
    """How many times smaller ``part`` is, as ``1/46``."""
    times = whole / part
    return f"1/{times:.0f}" if times >= 10 else f"1/{times:.1f}"


def mib(size: float) -> str:
    """A size in bytes, in MiB."""
    return f"{size / 2**20:,.1f} MiB"
