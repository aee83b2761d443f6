"""``bullpen ps``: the instances there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, connect, print_json

if TYPE_CHECKING:
    from bullpen.client import InstanceList, Readiness


def ps(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print ids alone.")] = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """List instances: what they serve, how they are, where they answer.

    START: how the process was made, and the time it then took to be ready.
    A spare was forked warm before the request, a fork for the request;
    a spawn is a fresh interpreter that imported the engine itself.
    A narrow terminal shows fewer columns.

    \b
    Examples:
      bullpen ps
      bullpen stop $(bullpen ps -q)
    """
    with connect(url, access_key) as client:
        found = client.list()
        if json_output:
            print_json(found.document)
        elif quiet:
            for instance in found.instances:
                print(instance.instance_id)
        else:
            show(found, client.ready())
    return 0


def show(found: InstanceList, readiness: Readiness) -> None:
    """Print the table, and what is worth a line of its own."""
    from datetime import UTC, datetime

    from rich.text import Text

    from bullpen.cli import words
    from bullpen.cli.console import new_console
    from bullpen.cli.table import instance_table

    console = new_console()
    for zygote in readiness.zygotes:
        if zygote.state != "warm" and (zygote.engine == readiness.engine or zygote.state == "warming"):
            console.print(words.warming(zygote))
    if readiness.waiting:
        one = readiness.waiting == 1
        console.print(f"{readiness.waiting} {'create waits' if one else 'creates wait'} to be started")
    instances = found.instances
    if not instances:
        print("No instances. `bullpen run MODEL` starts one.")
        return
    console.print(instance_table(instances, datetime.now(UTC), console.width if console.is_terminal else None))
    for instance in instances:
        if instance.error is not None:
            console.print(Text(f"{instance.instance_id}: {instance.error.message}", "red"))
