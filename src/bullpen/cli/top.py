"""``bullpen top``: GPUs and instances as they are now, live."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, WrongUsageError, connect, in_background, print_json
from bullpen.errors import BullpenError

if TYPE_CHECKING:
    from rich.console import Console

    from bullpen.cli.screen import Snapshot
    from bullpen.client import BullpenClient

SECONDS = 1.0
"""How often all is asked for anew where nothing happens."""
SHORTEST_PAUSE = 0.1
"""Between two looks, however much happens."""
PLAIN_WIDTH = 160
"""The width of a frame that goes to no terminal."""
QUIT_KEYS = "qQ"


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Show GPUs and instances live: who is awake where, who sleeps there, how much memory is used, and why.

    Below each instance: what it does or waits for, else what was decided about it last.
    It ends on q or Ctrl-C.

    \b
    Examples:
      bullpen top
      bullpen top --once
    """
    from bullpen.cli.console import new_console
    from bullpen.cli.screen import frame

    console = new_console()
    with connect(url, access_key) as client:
        if json_output:
            print_json(look(client).document())
        elif once:
            width = console.width if console.is_terminal else PLAIN_WIDTH
            console.print(frame(look(client), datetime.now(UTC), width))
        elif not console.is_terminal or console.is_dumb_terminal:
            raise WrongUsageError("top needs a terminal; `bullpen top --once` prints one frame, --json the data")
        else:
            return Top(client, console).run()
    return 0


def look(client: BullpenClient) -> Snapshot:
    """What the daemon tells now."""
    from bullpen.cli.screen import Snapshot

    return Snapshot(client.url, client.list(), client.gpus(), client.ready())


class Top:
    """The live view.

    Three threads feed it: one asks the daemon, one hears what happens there, one reads keys. So neither a daemon that
    does not answer nor a driver that hangs keeps it from ending.
    """

    def __init__(self, client: BullpenClient, console: Console) -> None:
        self._client = client
        self._console = console
        self._news: SimpleQueue[Snapshot | None] = SimpleQueue()
        self._look_again = threading.Event()

    def run(self) -> int:
        """Show it until somebody has seen enough; return the exit code."""
        first = look(self._client)
        over = threading.Event()
        in_background(partial(self._ask, first), over)
        in_background(partial(self._listen, first.found.revision), over)
        try:
            self._show(first)
        finally:
            over.set()
        return 0

    def _show(self, first: Snapshot) -> None:
        from rich.live import Live

        from bullpen.cli.keys import reading_keys
        from bullpen.cli.screen import frame

        snapshot: Snapshot | None = first
        with (
            reading_keys(self._pressed),
            Live(
                console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            ) as live,
        ):
            while snapshot is not None:
                width, height = self._console.size
                live.update(frame(snapshot, datetime.now(UTC), width, height), refresh=True)
                snapshot = self._next(snapshot)

    def _next(self, current: Snapshot) -> Snapshot | None:
        """The newest there is, after a while at most; None: quit."""
        try:
            newest = self._news.get(timeout=SECONDS)
            while newest is not None and not self._news.empty():
                newest = self._news.get()
        except Empty:
            return current
        return newest

    def _pressed(self, key: str) -> None:
        if key in QUIT_KEYS:
            self._news.put(None)

    def _ask(self, snapshot: Snapshot) -> None:
        """Ask the daemon again and again; what cannot be had new is shown as it was, with the reason."""
        from dataclasses import replace

        while True:
            self._look_again.wait(SECONDS)
            self._look_again.clear()
            try:
                snapshot = look(self._client)
            except BullpenError as problem:
                snapshot = replace(snapshot, trouble=str(problem))
            self._news.put(snapshot)
            time.sleep(SHORTEST_PAUSE)

    def _listen(self, since: int) -> None:
        """Have it look again as soon as something happens."""
        while True:
            try:
                for _ in self._client.watch(since, fine=True):
                    self._look_again.set()
            except BullpenError:
                pass  # the other thread says why
            time.sleep(SECONDS)
