"""Import a list of modules one by one, with times, failures and the first thread or context each one left behind."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from bullpen.zygote import guards


@dataclass
class ModuleReport:
    """How the import of one module went."""

    name: str
    seconds: float
    error: str | None = None
    side_effect: str | None = None
    """Why the process could not fork any more after this import, where it could before."""


@dataclass
class PreloadReport:
    """How warming went as a whole."""

    modules: list[ModuleReport] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[ModuleReport]:
        """The modules that could not be imported, or that left something behind."""
        return [module for module in self.modules if module.error or module.side_effect]


Progress = Callable[[ModuleReport, int, int], None]
"""Called after each module with its report, how many are done and how many there are."""


def import_modules(
    names: Sequence[str], report: PreloadReport, progress: Progress, *, before: int = 0, after: int = 0
) -> None:
    """Import every module of ``names``; a failure is noted and does not stop the rest.

    Modules that were imported as part of others are skipped without a report. ``before`` and ``after`` count the
    modules of other calls, so that progress over all of them never goes back.
    """
    started = time.monotonic()
    safe = guards.reason_not_to_fork() is None
    for number, name in enumerate(names, before + 1):
        if name in sys.modules:
            continue
        module = import_module(name)
        if safe and (reason := guards.reason_not_to_fork()):
            module.side_effect, safe = reason, False
        report.modules.append(module)
        progress(module, number, before + len(names) + after)
    report.seconds += time.monotonic() - started


def import_module(name: str) -> ModuleReport:
    """Import one module and say how that went."""
    started = time.monotonic()
    error = None
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as problem:  # an engine's module may raise anything, SystemExit among it
        error = f"{type(problem).__name__}: {problem}"[:300]
    return ModuleReport(name, time.monotonic() - started, error)


def read_names(lines: Iterable[str]) -> list[str]:
    """Read a list of names: one a line, ``#`` begins a comment."""
    names = (line.partition("#")[0].strip() for line in lines)
    return [name for name in names if name]
