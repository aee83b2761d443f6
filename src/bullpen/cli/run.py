"""``bullpen run``: start a server of a model and stay with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, WrongUsageError, connect
from bullpen.cli.hints import AdvisedError, make_room, sentence
from bullpen.errors import InvalidRequestError

GPUS, SLEEP = "GPUs", "Sleep"


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
        list[str] | None,
        typer.Option("--gpu", metavar="GPU", help="A GPU for it, by UUID or index. Repeatable.", rich_help_panel=GPUS),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many GPUs of Bullpen's choice it gets.", rich_help_panel=GPUS),
    ] = None,
    gpu_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How much of each it takes, above 0 and at most 1, so that others may have the rest."
            " Default: it has them alone.",
            rich_help_panel=GPUS,
        ),
    ] = None,
    sleep: Annotated[
        Literal["engine", "emulate", "off"] | None,
        typer.Option(
            metavar="KIND",
            help="How it may sleep: engine (vLLM's sleep mode), emulate (its process ends, its place is kept) or off."
            " Default: engine where it has GPUs.",
            rich_help_panel=SLEEP,
        ),
    ] = None,
    sleep_after: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Sleep after so long without a request: 90s, 5m, 1h30m.", rich_help_panel=SLEEP
        ),
    ] = None,
    discard_after: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Then discard the weights (level 2).", rich_help_panel=SLEEP),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Then end its process; a wake starts it again.", rich_help_panel=SLEEP),
    ] = None,
    pin: Annotated[
        bool,
        typer.Option("--pin", help="Never put it to sleep for others or for want of memory.", rich_help_panel=SLEEP),
    ] = False,
    priority: Annotated[
        int | None,
        typer.Option(metavar="N", help="The higher, the later it must make room. Default: 0.", rich_help_panel=SLEEP),
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
      bullpen run Qwen/Qwen3-8B --gpus 1 --sleep-after 5m --stop-after 2h
    """
    variables = read_variables(env or [])
    check_options(model, options or ())
    wishes = {
        "gpus": gpus,
        "gpu_share": gpu_share,
        "sleep": sleep,
        "sleep_after": read_time(sleep_after, "--sleep-after"),
        "discard_after": read_time(discard_after, "--discard-after"),
        "stop_after": read_time(stop_after, "--stop-after"),
        "pin": pin,
        "priority": priority,
    }
    from bullpen.cli.console import new_console
    from bullpen.cli.running import Request, Running
    from bullpen.client import Refused

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
            wishes={name: value for name, value in wishes.items() if value not in (None, False)},
        )
        running = Running(client, request, new_console(stderr=json_output), detach=detach, json_output=json_output)
        try:
            return running.go()
        except Refused as problem:
            raise AdvisedError(sentence(problem, way=make_room(client))) from problem


def check_options(model: str, options: Sequence[str]) -> None:
    """Refuse a model in vLLM's options beside the one that is named.

    Raises:
        WrongUsageError: there is one.
    """
    if any(word == "--model" or word.startswith("--model=") for word in options):
        raise WrongUsageError(f"the model is named twice, as {model} and behind `--`; leave --model out")


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


def read_time(text: str | None, option: str) -> float | None:
    """A length of time in seconds.

    Raises:
        WrongUsageError: the text is none.
    """
    from bullpen.core.request import read_seconds

    try:
        return read_seconds(text, option)
    except InvalidRequestError as problem:
        raise WrongUsageError(str(problem)) from problem


def local_folder(model: str) -> str:
    """A model's folder by its full path, for the daemon works in another folder; a name stays what it is."""
    try:
        return str(Path(model).absolute()) if Path(model).is_dir() else model
    except (OSError, ValueError):
        return model
