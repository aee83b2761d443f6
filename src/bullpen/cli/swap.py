"""``bullpen swap``: one model comes in, others go out."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import (
    DrainOption,
    JsonOption,
    KeyOption,
    LevelOption,
    RefuseOption,
    UrlOption,
    WrongUsageError,
    complete_ids,
    connect,
    goes_on,
    in_background,
    print_json,
)
from bullpen.cli.hints import AdvisedError, sentence, swap_with

if TYPE_CHECKING:
    from bullpen.cli.swapping import SwapDisplay
    from bullpen.client import BullpenClient, Swapped

LOOK_SECONDS = 0.5
"""How often a Ctrl-C is looked for while the swap goes on."""


def swap(
    incoming: Annotated[
        str, typer.Argument(metavar="IN", help="What shall be ready.", autocompletion=complete_ids, show_default=False)
    ],
    outgoing: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OUT...",
            help="What goes to sleep for it. Default: whatever is in its way, least important first.",
            autocompletion=complete_ids,
        ),
    ] = None,
    level: LevelOption = None,
    drain: DrainOption = None,
    refuse: RefuseOption = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Have one instance ready in the place of others: they sleep, it wakes, in one step.

    If what comes in does not come up, all is put back as it was, and the command says why.
    Ctrl-C ends the command; the swap goes on.

    \b
    Examples:
      bullpen swap qwen opt-125m
      bullpen swap qwen
    """
    out = list(dict.fromkeys(outgoing or ()))
    if incoming in out:
        raise WrongUsageError(f"{incoming} cannot come in and go out; name what goes out behind it, or nothing")
    from bullpen.cli.console import new_console
    from bullpen.cli.swapping import SwapDisplay
    from bullpen.client import Refused

    with connect(url, access_key) as client:
        before = client.list()
        was_ready = any(one.instance_id == incoming and one.state == "ready" for one in before.instances)
        doing: Future[Swapped] = Future()
        over = threading.Event()
        try:
            with SwapDisplay(new_console(stderr=json_output), incoming, out, was_ready=was_ready) as display:
                in_background(partial(show, client, before.revision, display), over)
                in_background(partial(do, client, doing, incoming, out, level, drain, refuse), over)
                done = wait_for(doing)
                display.done(done)
        except KeyboardInterrupt:
            goes_on("swap", incoming)
            raise
        except Refused as problem:
            about = out[0] if len(out) == 1 else "ID"
            raise AdvisedError(sentence(problem, about, swap_with(incoming, out))) from problem
        finally:
            over.set()
    if json_output:
        print_json(done.document)
    return 0


def show(client: BullpenClient, since: int, display: SwapDisplay) -> None:
    """Show what has happened since a revision, as long as the command runs."""
    from bullpen.client import ClientError

    with suppress(ClientError):  # the swap itself will tell
        for event in client.watch(since, fine=True):
            display.update(event)


def do(
    client: BullpenClient,
    doing: Future[Swapped],
    incoming: str,
    out: list[str],
    level: int | None,
    drain: float | None,
    refuse: bool,
) -> None:
    """Swap, and leave the outcome."""
    try:
        doing.set_result(client.swap(incoming, out or "auto", level, drain, refuse))
    except BaseException as problem:
        doing.set_exception(problem)


def wait_for(doing: Future[Swapped]) -> Swapped:
    """Wait for the outcome, and stay open to Ctrl-C meanwhile."""
    while True:
        try:
            return doing.result(LOOK_SECONDS)
        except NotYet:
            if doing.done():
                raise
