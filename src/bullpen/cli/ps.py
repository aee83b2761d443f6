"""``bullpen ps``: the instances there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, connect, print_json

if TYPE_CHECKING:
    from bullpen.client import GpuReport, InstanceList, Readiness


def ps(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print ids alone.")] = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """List instances: what they serve, how they are, which GPUs they have, where they answer.

    A sleeping one is shown with its level: 1 keeps the weights in host memory, 2 has discarded them.
    GPU MiB: what it was measured to hold on each of its GPUs, as it is now.
    Below the table: programs that hold memory on a GPU and belong to no instance.

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
            show(found, client.ready(), client.gpus())
    return 0


def show(found: InstanceList, readiness: Readiness, report: GpuReport) -> None:
    """Print the table, and what is worth a line of its own."""
    from datetime import UTC, datetime

    from rich.text import Text

    from bullpen.cli import gpus, words
    from bullpen.cli.console import new_console
    from bullpen.cli.table import Context, instance_table

    console = new_console()
    for line in words.launching(readiness):
        console.print(line)
    instances = found.instances
    if instances:
        context = Context(datetime.now(UTC), gpus.indices(report))
        console.print(instance_table(instances, context, console.width if console.is_terminal else None))
    elif not readiness.waiting:
        print("No instances. `bullpen run MODEL` starts one.")
    for instance in instances:
        if instance.error is not None:
            console.print(Text(f"{instance.instance_id}: {instance.error.message}", "red"))
    for line in gpus.troubles(report):
        console.print(Text(line, "yellow"))
