"""What the demo shows: a line for each step, live while one lasts, and the tables at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bullpen.demo.chat import Answer, printable
from bullpen.demo.cold import Cold
from bullpen.demo.daemon import Started
from bullpen.demo.models import Engine
from bullpen.demo.processes import Process, total_pss

MEGABYTE = 10**6
WIDEST = 100
LABEL = 8
INDENT = 2
LOG_LINES = 4


class Report:
    """The demo's output, pretty on a terminal and plain elsewhere.

    Args:
        json_output: leave standard output to the one document; what is shown goes to a terminal's standard error.
    """

    def __init__(self, json_output: bool) -> None:
        stream = sys.stderr if json_output else sys.stdout
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no check mark gets a question mark
        self.console = Console(file=stream, highlight=False, quiet=json_output and not stream.isatty())

    # -- steps --------------------------------------------------------------------------------------------------

    def title(self, engine: Engine) -> None:
        """Say what this is."""
        self.console.print(Text.assemble("\n", ("Bullpen", "bold"), f" with real vLLM {engine.version}, cold and warm"))
        self.console.print(Text("two tiny models; their weights are random, and so are their answers\n", "dim"))

    @contextmanager
    def live(self, label: str, text: str) -> Iterator[Callable[[str, float], None]]:
        """While a step lasts: what it does, how far it is and for how long it has been at it."""
        if not self.console.is_terminal:
            self._row("…", label, text)
            yield lambda phase, progress: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn(f"{label:<{LABEL}} {text}"),
            BarColumn(16),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=1.0, phase="")
            yield lambda phase, done: progress.update(task, completed=done, phase=phase)

    def done(self, label: str, text: str, seconds: float | None = None) -> None:
        """A step that went right."""
        self._row("[green]✓[/]", label, text, "" if seconds is None else duration(seconds))

    def _row(self, mark: str, label: str, text: RenderableType, right: str = "") -> None:
        grid = Table.grid(padding=(0, 1))
        grid.width = self._width
        grid.add_column(width=1)
        grid.add_column(width=LABEL, style="bold")
        grid.add_column(ratio=1)
        grid.add_column(justify="right", style="cyan", no_wrap=True)
        grid.add_row(mark, label, text, right)
        self.console.print(grid)

    @property
    def _width(self) -> int:
        return min(self.console.width, WIDEST)

    def started(self, started: Started) -> None:
        """An instance that is ready, with the seconds at which its phases began."""
        self.done(started.name, "created over REST, to its first token", started.first_token)
        phases = [(name.replace("_", " "), at) for name, at in started.instance.phases.items() if name != "start"]
        self._row("", "", Columns([Text(f"{name} {at:.2f}", "dim") for name, at in phases], padding=(0, 3)))

    def answer(self, model: str, answer: Answer) -> None:
        """A completion."""
        self.done(model, f"“{printable(answer.text)}”", answer.seconds)

    @contextmanager
    def streaming(self, model: str) -> Iterator[Callable[[str], None]]:
        """A completion as it comes; the text may be wrapped by the terminal, so nothing stands to the right of it."""
        self.console.print(Text.assemble(("✓ ", "green"), (f"{model:<{LABEL}}", "bold"), " streamed: “"), end="")
        yield lambda piece: self.console.print(Text(printable(piece), "cyan"), end="", soft_wrap=True)
        self.console.print("”")

    def gap(self) -> None:
        """An empty line."""
        self.console.print()

    # -- tables -------------------------------------------------------------------------------------------------

    def processes(self, tree: Sequence[Process]) -> None:
        """The tree, and whose memory is whose."""
        table = self._table("Processes, and their memory in MB")
        table.add_column("process", no_wrap=True, overflow="ellipsis", ratio=1)
        for name in ("pid", "private", "shared", "PSS"):
            table.add_column(name, justify="right", no_wrap=True)
        for process, branch in zip(tree, branches([process.depth for process in tree]), strict=True):
            amounts = (megabytes(amount) for amount in (process.private, process.shared, process.pss))
            table.add_row(Text(branch + process.title), str(process.pid), *amounts)
        table.add_row("together", "", "", "", megabytes(total_pss(tree)), style="bold")
        self._print(table)
        note = "shared: with the zygote, and libraries; PSS: private and a fair part of shared"
        self.console.print(Padding(Text(note, "dim"), (0, 0, 0, INDENT)))

    def log(self, name: str, text: str) -> None:
        """The end of a log."""
        table = self._table(f"The end of {name}'s log")
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1, style="dim")
        for line in text.splitlines()[-LOG_LINES:]:
            table.add_row(Text(printable(line)))
        table.show_header = False
        self._print(table)

    def summary(self, cold: Cold, started: Sequence[Started], further: int) -> None:
        """The figures this was about."""
        table = self._table("What it comes to")
        table.add_column("to the first token", ratio=1)
        for name in ("", "cold to warm"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(f"vllm serve {started[0].name}, cold, measured once", duration(cold.first_token), "")
        for one in started:
            ratio = f"{cold.first_token / one.first_token:.0f} to 1"
            table.add_row(f"{one.name} from Bullpen, warm", duration(one.first_token), ratio)
        table.add_row("")
        table.add_row(Text("host memory", "bold"))
        table.add_row(f"vllm serve {started[0].name}, cold", f"{megabytes(cold.memory)} MB", "")
        ratio = f"{cold.memory / further:.1f} to 1"
        table.add_row("a further one from Bullpen, warm", f"{megabytes(further)} MB", ratio)
        self._print(table)

    def _table(self, title: str) -> Table:
        width = self._width - INDENT
        return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, width=width)

    def _print(self, table: Table) -> None:
        self.console.print(Padding(table, (1, 0, 0, INDENT), expand=False))

    def next_steps(self, commands: Sequence[tuple[str, str]]) -> None:
        """Where to go from here; a command is one line however long it is, to be copied as it stands."""
        self.console.print(Text("\n  Next", "bold"))
        for command, meaning in commands:
            for line in meaning.splitlines():
                self.console.print(Text(f"  # {line}", "dim"), soft_wrap=True)
            self.console.print(Text(f"  {command}\n", "cyan"), soft_wrap=True)

    def failed(self, problem: str) -> None:
        """A step that went wrong."""
        self.console.print(Text.assemble(("✗ ", "red"), problem), soft_wrap=True)


def branches(depths: Sequence[int]) -> list[str]:
    """The lines that draw a tree whose nodes come with their depths, parents before children."""
    drawn = []
    for place, depth in enumerate(depths):
        stems = ["│  " if goes_on(depths[place + 1 :], level) else "   " for level in range(1, depth)]
        own = ("├─ " if goes_on(depths[place + 1 :], depth) else "└─ ") if depth else ""
        drawn.append("".join(stems) + own)
    return drawn


def goes_on(below: Sequence[int], level: int) -> bool:
    """Whether a branch at some level has another node further down."""
    return next((depth == level for depth in below if depth <= level), False)


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def megabytes(amount: int) -> str:
    """Bytes as millions."""
    return f"{amount / MEGABYTE:.0f}"
