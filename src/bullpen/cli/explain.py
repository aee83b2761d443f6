"""``bullpen explain``: why an instance is as it is."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, complete_ids, connect, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bullpen.client import Activity, Explanation, NextStep, Verdict


def explain(
    instance_id: Annotated[str, typer.Argument(metavar="ID", help="The instance.", autocompletion=complete_ids)],
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Say why an instance is as it is: its state, what it waits for, what comes next, and what was decided about it.

    \b
    Example:
      bullpen explain opt-125m
    """
    with connect(url, access_key) as client:
        found = client.explain(instance_id)
        if json_output:
            print_json(found.document)
            return 0
        pinned = bool(client.get(instance_id).document.get("pin"))
    from bullpen.cli.console import new_console

    console = new_console()
    for part in report(found, datetime.now().astimezone(), pinned=pinned):
        console.print(part)
    return 0


def report(found: Explanation, now: datetime, *, pinned: bool = False) -> list[RenderableType]:
    """The explanation for people."""
    from rich.table import Table
    from rich.text import Text

    from bullpen.cli import words
    from bullpen.client import Activity

    heading = Text.assemble((found.instance_id, "bold"), "  ", (found.state, words.COLOURS.get(found.state, "")))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("why", Text(found.summary))
    activity = found.document.get("activity")
    if activity:
        facts.add_row("now", Text(doing(Activity.read(activity), now)))
    facts.add_row("waits", Text(found.waits_for or "for nothing"))
    if found.next_step or not activity:
        facts.add_row("next", Text(next_step(found.next_step, pinned=pinned)))
    for level, verdict in found.works.items():
        facts.add_row(f"sleep {words.level(level)}", Text(verdict_words(verdict, now)))
    notes = Table.grid(padding=(0, 2))
    notes.add_column(style="dim", no_wrap=True)
    notes.add_column(overflow="fold")
    for note in found.notes:
        notes.add_row(moment(note.at, now), Text(note.text))
    if not found.notes:
        notes.add_row("", Text("Nothing was decided about it yet."))
    return [heading, facts, Text("\nWhat happened", "bold"), notes]


def doing(activity: Activity, now: datetime) -> str:
    """What is under way: how far it is, why, and how long it has lasted."""
    from bullpen.cli import words

    lasted = ""
    if activity.since:
        lasted = f" ({words.so_far((now - datetime.fromisoformat(activity.since)).total_seconds())})"
    return f"{activity.doing}, {activity.stage}: {activity.reason}{lasted}"


def next_step(step: NextStep | None, *, pinned: bool) -> str:
    """What comes next, and when."""
    from bullpen.cli import words

    if step is None:
        stays = "it is pinned" if pinned else "it stays as it is"
        return f"{stays} until somebody asks for something else"
    to = "asleep (emulated)" if step.to == "emulated" else words.level(step.to)
    return f"{to} in {words.duration(step.in_seconds)}, {step.why}"


def verdict_words(verdict: Verdict | None, now: datetime) -> str:
    """Whether a level of sleep works, and how that is known."""
    if verdict is None:
        return "not tried yet"
    if not verdict.works and not verdict.at:
        return f"not available: {verdict.why}"
    when = f" ({moment(verdict.at, now)})" if verdict.at else ""
    return f"{'works' if verdict.works else 'does not work'}: {verdict.why}{when}"


def moment(text: str, now: datetime) -> str:
    """A time of the day here, with the date where it was another day."""
    at = datetime.fromisoformat(text).astimezone(now.tzinfo)
    return f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M:%S}"
