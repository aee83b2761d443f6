"""The display of a batch job: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from bullpen.cli import words
from bullpen.cli.display import LiveDisplay
from bullpen.cli.progress import bar
from bullpen.client.batch import BatchProgress, BatchReport

LINES = 10
"""How many lines tell of a whole job, where there is no terminal; a slow one has a line each `LINE_SECONDS`."""
LINE_SECONDS = 60.0
NOTHING = BatchProgress(0, 0, 0, 0.0, None)


class BatchDisplay(LiveDisplay):
    """Shows how far a job is.

    Args:
        console: where; animated if it is a terminal.
        source: the requests.
        output: the results.
    """

    def __init__(self, console: Console, source: Path, output: Path) -> None:
        self._source = source
        self._output = output
        self._progress = NOTHING
        self._told = 0
        self._told_at = time.monotonic()
        super().__init__(console)

    @property
    def successes(self) -> int:
        """How many results are successes."""
        return self._progress.done - self._progress.failed

    def resume(self, before: BatchProgress) -> None:
        """Say what earlier runs have left."""
        self._progress = before
        self._told = self._tenth(before)
        if before.done:
            self.note(f"{before.done} of {before.total} requests were done before")

    def update(self, progress: BatchProgress) -> None:
        """Show how far it is now."""
        self._progress = progress
        tenth, now = self._tenth(progress), time.monotonic()
        if self._live is None and (tenth > self._told or now - self._told_at > LINE_SECONDS):
            self._told, self._told_at = tenth, now
            self.note(line(progress))

    def _tenth(self, progress: BatchProgress) -> int:
        return LINES * progress.done // max(progress.total, 1)

    def note(self, text: str) -> None:
        """Leave a line."""
        self._console.print(text, soft_wrap=True)

    def so_far(self) -> str:
        """How far it is, in words."""
        return f"{self._progress.done} of {self._progress.total} requests are done"

    def done(self, report: BatchReport) -> None:
        """Leave the summary of a job that is done."""
        new = report.total - report.resumed
        pace = f" in {words.duration(report.seconds)} ({rate(new / max(report.seconds, 1e-6))})" if new else ""
        mark = ("✗ ", "yellow") if report.failed else ("✓ ", "green")
        what = f"{report.total} requests are done" if not new else f"{new} requests done{pace}"
        self._console.print(Text.assemble(mark, f"{what}; the results are in {self._output}"), soft_wrap=True)
        if report.failed:
            self.note(
                f"{report.failed} of {report.total} failed: their lines have an error, or a status_code of 400 up"
            )

    def _render(self) -> RenderableType:
        heading = Text.assemble((self._source.name, "bold"), " → ", (self._output.name, "bold"))
        progress = self._progress
        return Group(heading, bar(progress.done / max(progress.total, 1), line(progress)))


def line(progress: BatchProgress) -> str:
    """How far a job is: ``300 of 1000  81/s  about 9 s left  2 failed``."""
    parts = [f"{progress.done} of {progress.total}"]
    if progress.rate:
        parts += [rate(progress.rate), words.time_left(progress.seconds_left)]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    return "  ".join(part for part in parts if part)


def rate(a_second: float) -> str:
    """A rate that people can read: ``81/s``, ``2.5/s``, ``30/min``."""
    if a_second >= 10:
        return f"{a_second:.0f}/s"
    return f"{a_second:.1f}/s" if a_second >= 1 else f"{60 * a_second:.1f}/min"
