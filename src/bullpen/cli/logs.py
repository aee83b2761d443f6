"""``bullpen logs``: an instance's log."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import (
    INTERRUPTED,
    JsonOption,
    KeyOption,
    UrlOption,
    WrongUsageError,
    complete_ids,
    connect,
    print_json,
)

if TYPE_CHECKING:
    from bullpen.client import BullpenClient


def logs(
    instance_id: Annotated[str, typer.Argument(metavar="ID", help="The instance.", autocompletion=complete_ids)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    tail: Annotated[int | None, typer.Option(metavar="N", min=0, help="Begin with the last N lines.")] = None,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Print the log of an instance, as it is: everything that its processes wrote.

    A failed or stopped instance keeps its log until it is removed with `bullpen stop`.

    \b
    Examples:
      bullpen logs opt-125m
      bullpen logs opt-125m --tail 20 -f
    """
    if json_output and follow:
        raise WrongUsageError("--json and --follow exclude each other: JSON is printed when all of it is there")
    from bullpen.cli.tail import start_of_last_lines

    with connect(url, access_key) as client:
        start = 0 if tail is None else start_of_last_lines(client, instance_id, tail)
        if json_output:
            chunks = list(client.log_chunks(instance_id, start))
            text = b"".join(chunk.data for chunk in chunks).decode(errors="replace")
            total = chunks[-1].total if chunks else client.log_chunk(instance_id, start).total
            print_json({"instance_id": instance_id, "log": text, "total": total})
            return 0
        pieces = (chunk.data for chunk in client.log_chunks(instance_id, start))
        try:
            for data in client.follow_log(instance_id, start) if follow else pieces:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            if follow:
                print(f"bullpen: {how_ended(client, instance_id)}", file=sys.stderr)
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def how_ended(client: BullpenClient, instance_id: str) -> str:
    """Why there is no more of a log that was followed."""
    from bullpen.client import Refused

    try:
        instance = client.get(instance_id)
    except Refused as problem:
        if problem.status != 404:
            raise
        return f"{instance_id} was stopped and removed"
    code = f" with exit code {instance.exit_code}" if instance.exit_code is not None else ""
    return f"{instance_id} has ended{code}; this was its log"
