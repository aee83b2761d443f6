"""``bullpen stop``: stop and remove instances."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from bullpen.cli.common import (
    JsonOption,
    KeyOption,
    UrlOption,
    WrongUsageError,
    complain,
    complete_ids,
    connect,
    print_json,
    side_by_side,
)
from bullpen.cli.hints import sentence
from bullpen.errors import BullpenError


def stop(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="The instances.", autocompletion=complete_ids)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All instances there are.")] = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Stop instances side by side, and remove them with their logs.

    When it returns, no process of them is left. One that has ended by itself is removed too.

    \b
    Examples:
      bullpen stop opt-125m
      bullpen stop --all
    """
    if ids and everything:
        raise WrongUsageError("give ids, or --all, not both")
    if not ids and not everything:
        raise WrongUsageError("give the ids of instances, or --all for all of them")
    started = time.monotonic()
    stopped, code = [], 0
    with connect(url, access_key) as client:
        names = [one.instance_id for one in client.list().instances] if everything else dict.fromkeys(ids or ())
        for name, outcome in side_by_side(client.delete, names):
            if isinstance(outcome, BullpenError):
                if everything and is_gone(outcome):
                    continue
                complain(sentence(outcome))
                code = 1
                continue
            stopped.append(outcome.document)
            if not json_output:
                word = "removed, it had ended" if outcome.status == "not_running" else "stopped"
                print(f"{name} {word} ({time.monotonic() - started:.2f} s)", flush=True)
    if json_output:
        print_json({"stopped_instances": stopped, "total_stopped": len(stopped)})
    elif not stopped and code == 0:
        print("Nothing to stop: there are no instances.")
    return code


def is_gone(problem: BullpenError) -> bool:
    """Whether somebody else has removed the instance meanwhile."""
    from bullpen.client import Refused

    return isinstance(problem, Refused) and problem.status == 404
