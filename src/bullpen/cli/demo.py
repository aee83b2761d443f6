"""``bullpen demo``: the main job, shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bullpen.cli.common import JsonOption


def demo(
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the tiny models are kept for the next time.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the daemon's state directory for a look at it.")] = False,
    json_output: JsonOption = False,
) -> int:
    """Start two real vLLM servers warm, beside a cold start for comparison.

    Everything happens on this machine: the two tiny models are made here, nothing is downloaded.

    \b
    Example:
      bullpen demo
    """
    from bullpen.demo.main import run

    return run(cache=cache, keep=keep, json_output=json_output)
