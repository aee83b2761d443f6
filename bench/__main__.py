"""``python -m bench``: choose benchmarks, show how far they are, print the tables, keep the results."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table as RichTable

from bench import adoption, daemon, docs, gpu_checkpoint, gpu_sleep, inference, launches, memory, start, swap
from bench.common import BenchError, Options, Result, UnavailableError

LATEST = Path(__file__).with_name("results") / "latest.json"


class Name(StrEnum):
    """The benchmarks, in the order in which they run."""

    START = "start"
    MEMORY = "memory"
    DAEMON = "daemon"
    ADOPTION = "adoption"
    SWAP = "swap"
    LAUNCHES = "launches"
    GRPC = "grpc"
    GPU_SLEEP = "gpu-sleep"
    GPU_CHECKPOINT = "gpu-checkpoint"


BENCHMARKS: dict[str, ModuleType] = {
    Name.START: start,
    Name.MEMORY: memory,
    Name.DAEMON: daemon,
    Name.ADOPTION: adoption,
    Name.SWAP: swap,
    Name.LAUNCHES: launches,
    Name.GRPC: inference,
    Name.GPU_SLEEP: gpu_sleep,
    Name.GPU_CHECKPOINT: gpu_checkpoint,
}


class Shown:
    """Progress as a bar on a terminal, as a line for each step elsewhere."""

    def __init__(self, name: str, console: Console, bars: Bars) -> None:
        self._name = name
        self._console = console
        self._bars = bars
        self._task = bars.add_task(name, total=None)
        self._begun = False

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._bars.update(self._task, total=steps)

    def step(self, what: str) -> None:
        """Begin a step."""
        self._bars.update(self._task, advance=1 if self._begun else 0, description=f"{self._name}: {what}")
        self._begun = True
        if not self._console.is_terminal:
            self._console.print(f"{self._name}: {what}")

    def done(self) -> None:
        """End the bar."""
        self._bars.update(self._task, advance=1, description=self._name)


def main(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"[{'|'.join(Name)}]… [MODEL]…",
            help="what to run, all where nothing is named; after gpu-sleep, the models that it serves",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer runs, for a look")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the results there too")
    ] = None,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="make docs/performance.md from the newest results")
    ] = False,
) -> None:
    """Measure Bullpen beside what you would use instead, and print the tables.

    The newest result of each benchmark is kept in bench/results/latest.json. One that this machine cannot run says so
    and is no failure: the exit status is 0, and --json has no entry for it.
    """
    chosen, models = read_words(words or [])
    console = Console(highlight=False)
    results = read_results()
    measured = []
    failed = False
    for name in chosen:
        try:
            results[name] = run(name, quick, models, console)
            measured.append(name)
        except UnavailableError as problem:
            console.print(f"{name}: not measured: {plain(str(problem))}")
        except (BenchError, OSError) as problem:
            console.print(f"[red]{name}:[/] {problem}")
            failed = True
        write_json(LATEST, results)
    results = {name: results[name] for name in BENCHMARKS if name in results}
    if json_file is not None:
        write_json(json_file, {name: results[name] for name in measured})
    if write_docs:
        docs.write(results, {name: module.TITLE for name, module in BENCHMARKS.items() if name not in results})
        console.print(f"written: {docs.PAGE}")
    raise typer.Exit(1 if failed else 0)


def read_words(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The names of benchmarks, and the models: what follows ``gpu-sleep`` and names no benchmark.

    Raises:
        typer.BadParameter: another word names no benchmark.
    """
    names = [word for word in words if word in BENCHMARKS]
    models = tuple(word for word in words if word not in BENCHMARKS)
    if models and Name.GPU_SLEEP not in words[: words.index(models[0])]:
        raise typer.BadParameter(f"there is no benchmark '{models[0]}'; there are: {', '.join(BENCHMARKS)}")
    return names or list(BENCHMARKS), models


def run(name: str, quick: bool, models: tuple[str, ...], console: Console) -> dict[str, Any]:
    """Run one benchmark, print its tables and return its result as JSON data."""
    machine = docs.machine()
    folder = Path(tempfile.mkdtemp(prefix="bullpen-bench-"))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    options = Options(quick, folder, cache_folder() / "models", models)
    try:
        with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
            progress = Shown(name, console, bars)
            result: Result = BENCHMARKS[name].run(options, progress)
            progress.done()
    except (BenchError, OSError):
        console.print(f"[dim]logs are in {folder}[/]")
        raise
    except UnavailableError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    show(result, console)
    return {"machine": machine, "quick": quick, **asdict(result)}


def cache_folder() -> Path:
    """Where models are kept from run to run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bullpen"


def show(result: Result, console: Console) -> None:
    """Print the tables and what was to be reached."""
    console.rule(plain(result.title))
    for table in result.tables:
        shown = RichTable(
            title=plain(table.title), caption=plain(table.note), title_justify="left", caption_justify="left"
        )
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*map(plain, row))
        console.print(shown)
    for goal in result.goals:
        mark = "[green]reached[/]" if goal.reached else "[red]not reached[/]"
        console.print(f"{plain(goal.what)}: {goal.measured} (to reach: {goal.limit}): {mark}")


def plain(text: str) -> str:
    """Text without Markdown's marks, and without what Rich would take for its own."""
    return text.replace("**", "").replace("`", "").replace("[", r"\[")


def read_results() -> dict[str, Any]:
    """The newest results so far."""
    try:
        content: dict[str, Any] = json.loads(LATEST.read_text())
    except (OSError, ValueError):
        return {}
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    typer.run(main)
