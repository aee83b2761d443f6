"""``bullpen sleep`` and ``bullpen wake``: give a model's GPUs to others, and have it back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    complain,
    complete_ids,
    connect,
    goes_on,
    print_json,
    side_by_side,
)
from bullpen.cli.hints import sentence, swap_with
from bullpen.errors import BullpenError

if TYPE_CHECKING:
    from bullpen.client import Instance

IdsArgument = Annotated[
    list[str], typer.Argument(metavar="ID...", help="The instances.", autocompletion=complete_ids, show_default=False)
]


def sleep(
    ids: IdsArgument,
    level: LevelOption = None,
    drain: DrainOption = None,
    refuse: RefuseOption = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Put instances to sleep, side by side: each gives its GPU memory back and is soon awake again.

    Requests in flight end first. Requests that come while it sleeps are held until it is awake.
    At level 1 the weights wait in host memory, at level 2 they are read anew at the wake.
    One that was started with `--sleep emulate` ends its process and keeps its place.

    \b
    Examples:
      bullpen sleep opt-125m
      bullpen sleep opt-125m qwen --level 2 --drain 10
    """
    with connect(url, access_key) as client:
        return do("sleep", ids, partial(client.sleep, level=level, drain=drain, refuse=refuse), json_output)


def wake(ids: IdsArgument, json_output: JsonOption = False, url: UrlOption = None, access_key: KeyOption = None) -> int:
    """Wake instances, side by side, and wait until they answer.

    One that sleeps wakes; one that was stopped by its time limits, or has failed, is started again.
    Where its GPU belongs to another instance now, that one is named: `bullpen swap` exchanges the two.

    \b
    Example:
      bullpen wake opt-125m
    """
    with connect(url, access_key) as client:
        return do("wake", ids, client.wake, json_output)


def do(what: str, ids: Sequence[str], work: Callable[[str], Instance], json_output: bool) -> int:
    """Do something with each instance, say what each has become, and return the exit code.

    Ctrl-C ends the command alone: the daemon goes on.
    """
    from bullpen.cli import words

    started = time.monotonic()
    left, done, code = dict.fromkeys(ids), [], 0
    try:
        for name, outcome in side_by_side(work, list(left)):
            del left[name]
            if isinstance(outcome, BullpenError):
                complain(sentence(outcome, name, swap_with(name) if what == "wake" else None))
                code = 1
                continue
            done.append(outcome.document)
            if not json_output:
                taken = words.duration(time.monotonic() - started)
                print(f"{name} {words.has_become(outcome)} ({taken})", flush=True)
    except KeyboardInterrupt:
        for name in left:
            goes_on(what, name)
        raise
    if json_output:
        print_json({"instances": done})
    return code
