"""Where text for people goes."""

from __future__ import annotations

from rich.console import Console

ENDLESS = 100_000


def new_console(*, stderr: bool = False) -> Console:
    """A console that adds no colours of its own; lines that go to no terminal are as long as they are."""
    console = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = ENDLESS
    return console
