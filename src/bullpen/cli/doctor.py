"""``bullpen doctor``: what is installed, what the machine allows, what to fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, print_json
from bullpen.errors import StateError

if TYPE_CHECKING:
    from bullpen.cli.checks import Finding

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


def doctor(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The YAML file that the daemon is started with.")
    ] = None,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Look at everything that Bullpen needs, and say what to fix.

    It sees the settings that `bullpen serve` would see: environment and YAML file.
    Exit code 1 if something will not work. Nothing is changed.

    \b
    Example:
      bullpen doctor
    """
    sections = examine(config, url, access_key)
    levels = [finding.level for _, findings in sections for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")  # type: ignore[arg-type]  # a str enum
    if json_output:
        found = [{"section": name, **finding.document()} for name, findings in sections for finding in findings]
        print_json({"ok": problems == 0, "problems": problems, "warnings": warnings, "findings": found})
    else:
        show(sections, problems, warnings)
    return 1 if problems else 0


def examine(config: Path | None, url: str | None, access_key: str | None) -> list[tuple[str, list[Finding]]]:
    """Make every check, section by section."""
    from bullpen.cli.checks import problem
    from bullpen.cli.checks.daemon import check_daemon
    from bullpen.cli.checks.gpus import check_gpus
    from bullpen.cli.checks.machine import check_machine
    from bullpen.cli.checks.software import check_software, look_into
    from bullpen.node.settings import Settings, load

    sections: list[tuple[str, list[Finding]]] = []
    try:
        settings = load({}, config)
    except StateError as trouble:
        advice = "correct it; what follows was looked at with the defaults"
        sections.append(("Settings", [problem("settings", str(trouble), advice)]))
        settings = Settings()
    interpreter = look_into(settings.engine_python)
    sections.append(("Software", guarded(lambda: check_software(settings, interpreter))))
    sections.append(("GPUs", guarded(lambda: check_gpus(settings, interpreter, url, access_key))))
    sections.append(("Machine", guarded(check_machine)))
    sections.append(("Daemon", guarded(lambda: check_daemon(settings, url, access_key))))
    return sections


def guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """Make a check; one that stumbles over a strange machine is a finding too."""
    from bullpen.cli.checks import warning

    try:
        return check()
    except Exception as trouble:
        return [warning("check", f"it could not be finished: {trouble!r}", "please report this, with the line above")]


def show(sections: Sequence[tuple[str, Sequence[Finding]]], problems: int, warnings: int) -> None:
    """Print the findings for people."""
    from rich.table import Table
    from rich.text import Text

    from bullpen.cli.console import new_console

    console = new_console()
    width = max(len(finding.subject) for _, findings in sections for finding in findings)
    for name, findings in sections:
        console.print(Text(name, "bold"))
        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column(min_width=min(width, 20))
        table.add_column(overflow="fold")
        for finding in findings:
            mark, colour = MARKS[finding.level]
            text = Text(finding.text)
            if finding.advice:
                text.append(f"\n→ {finding.advice}", colour)
            table.add_row(Text(f" {mark}", colour), Text(finding.subject, "dim"), text)
        console.print(table)
    summary = f"{count(problems, 'problem')}, {count(warnings, 'warning')}"
    console.print(Text(summary if problems or warnings else "All is well.", "bold"))


def count(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"
