"""What the commands share: options, errors, JSON. Everything heavy is imported when it is used."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bullpen.errors import BullpenError

if TYPE_CHECKING:
    from bullpen.client import BullpenClient

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""
COMPLETION_SECONDS = 1.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class WrongUsageError(BullpenError):
    """The command line does not make sense; exit code 2."""


def complete_ids(incomplete: str) -> list[str]:
    """The ids of instances that begin so, for the shell's completion."""
    from bullpen.client import BullpenClient

    try:
        with BullpenClient(timeout=COMPLETION_SECONDS) as client:
            ids = [instance.instance_id for instance in client.list().instances]
    except BullpenError:
        return []
    return [name for name in ids if name.startswith(incomplete)]


UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="BULLPEN_URL",
        metavar="URL",
        help="The daemon. Default: the one of this user's state directory, else port 8001 of this host.",
        rich_help_panel="Daemon",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--access-key",
        envvar=["BULLPEN_ACCESS_KEY", "VLLM_ACCESS_KEY"],
        metavar="KEY",
        help="Its access key; a variable keeps it out of the process list. Found by itself for a daemon of this user.",
        rich_help_panel="Daemon",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
LevelOption = Annotated[
    int | None,
    typer.Option(
        metavar="1|2",
        min=1,
        max=2,
        help="How deep: 1 keeps the weights in host memory, 2 discards them. Default: the lightest that works.",
    ),
]
DrainOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", min=0, help="How long requests in flight may take to end. Default: the daemon's --drain."
    ),
]
RefuseOption = Annotated[
    bool, typer.Option("--refuse", help="Answer new requests with 503 instead of holding them until it is awake.")
]


def connect(url: str | None, access_key: str | None) -> BullpenClient:
    """A client of the daemon that the options name."""
    from bullpen.client import BullpenClient

    return BullpenClient(url, access_key)


def complain(text: str) -> None:
    """Say on stderr what went wrong."""
    print(f"bullpen: {text}", file=sys.stderr)


def goes_on(what: str, name: str) -> None:
    """Say after a Ctrl-C that what was asked for is still being done."""
    complain(f"the {what} goes on; `bullpen explain {name}` tells how it ends")


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def in_background(work: Callable[[], None], over: threading.Event) -> None:
    """Do something in a thread that does not keep the command from ending.

    Once ``over`` is set, the client is closed under it, and whatever that raises there is no matter.
    """

    def do() -> None:
        try:
            work()
        except Exception:
            if not over.is_set():
                raise

    threading.Thread(target=do, daemon=True).start()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | BullpenError]]:
    """Do something with each item at the same time; give each outcome as it comes.

    The threads do not keep the command from ending early.
    """
    outcomes: queue.SimpleQueue[tuple[Item, Result | BullpenError]] = queue.SimpleQueue()

    def do(item: Item) -> None:
        try:
            outcomes.put((item, work(item)))
        except BullpenError as problem:
            outcomes.put((item, problem))

    threads = [threading.Thread(target=do, args=(item,), daemon=True) for item in items]
    for thread in threads:
        thread.start()
    for _ in threads:
        yield outcomes.get()
