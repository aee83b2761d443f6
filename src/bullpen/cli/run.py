"""``bullpen run``: start a server of a model and stay with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, WrongUsageError, connect


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name on Hugging Face, or its folder.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Options of `vllm serve`, behind `--`.")
    ] = None,
    instance_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="What to call it. Default: after the model.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="A variable for the server. Repeatable.")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option("--gpu", metavar="UUID", help="A GPU that it gets for itself. Repeatable.")
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="vllm or sim. Default: the daemon's.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is ready, and leave it running.")
    ] = False,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Start a server of a model, show how it comes up, and where it answers.

    The command stays until the server ends. Ctrl-C offers to stop it.
    With --json, one document about it is printed at the end.

    \b
    Examples:
      bullpen run facebook/opt-125m
      bullpen run ./my-model --id mine --detach -- --max-model-len 4096
    """
    variables = read_variables(env or [])
    if any(word == "--model" or word.startswith("--model=") for word in options or ()):
        raise WrongUsageError(f"the model is named twice, as {model} and behind `--`; leave --model out")
    from bullpen.cli.console import new_console
    from bullpen.cli.running import Request, Running

    with connect(url, access_key) as client:
        if client.target.is_local:
            model = local_folder(model)
        request = Request(
            model=model,
            options=shlex.join(["--model", model, *(options or [])]),
            instance_id=instance_id,
            env_vars=variables or None,
            gpu_uuids=gpu or None,
            engine=engine,
        )
        return Running(client, request, new_console(stderr=json_output), detach=detach, json_output=json_output).go()


def read_variables(given: Sequence[str]) -> dict[str, str]:
    """The variables in ``K=V`` words.

    Raises:
        WrongUsageError: a word has no ``=``.
    """
    variables = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise WrongUsageError(f"--env {word}: write it as NAME=VALUE")
        variables[name] = value
    return variables


def local_folder(model: str) -> str:
    """A model's folder by its full path, for the daemon works in another folder; a name stays what it is."""
    try:
        return str(Path(model).absolute()) if Path(model).is_dir() else model
    except (OSError, ValueError):
        return model
