"""``bullpen batch``: files of requests, done by a server that runs already or is launched for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, WrongUsageError, complete_ids, connect, print_json
from bullpen.cli.hints import AdvisedError, make_room, sentence
from bullpen.cli.run import check_options, local_folder
from bullpen.errors import InvalidRequestError

SOME_FAILED = 3
"""The exit code of a job that is done, and not all of whose results are successes."""

app = typer.Typer()


@app.callback(invoke_without_command=True)
def batch(context: typer.Context) -> None:
    """Have a file of requests done, many at a time; see `bullpen batch run --help`.

    \b
    Example:
      bullpen batch run jobs.jsonl -o out.jsonl --model facebook/opt-125m
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS", help="The requests, in the format of OpenAI's batch API.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where the results go, in the order of the requests.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Who does it: an instance or launch by its id, a model that is served now,"
            " or one that is launched for this and stopped afterwards.",
            autocompletion=complete_ids,
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="Options of `vllm serve` for a launch, behind `--`."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", metavar="N", min=1, help="How many requests are in flight.")
    ] = 64,
    gpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many GPUs a launch gets. Default: one, where there are any."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", metavar="KEY", help="What the model's own server wants to be asked with."),
    ] = None,
    json_output: JsonOption = False,
    url: UrlOption = None,
    grpc_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Its gRPC server, which hands requests on where the model's own server cannot be reached from here;"
            " https://HOST:PORT for TLS. Default: the port after the daemon's.",
            rich_help_panel="Daemon",
        ),
    ] = None,
    access_key: KeyOption = None,
) -> int:
    """Send a file of requests to a model, many at a time, and write the file of results.

    A job that ended early goes on when the same command is run again:
    what has a result is not sent again. Until all are there, the results
    are in OUT.partial, as they come. A server that ends is started again.
    With --json, one document about the job is printed at the end.

    \b
    A line of JOBS, here in two:
      {"custom_id": "1", "method": "POST", "url": "/v1/completions",
       "body": {"prompt": "Once upon a time", "max_tokens": 64}}

    \b
    Exit codes:
      0    every request has a result, and each is a success
      1    the job ended early; run the command again, and it goes on
      2    the command line or JOBS is wrong; nothing was sent
      3    every request has a result, and some are failures
      130  ended by Ctrl-C; run the command again, and it goes on

    \b
    Examples:
      bullpen batch run jobs.jsonl -o out.jsonl --model chat
      bullpen batch run jobs.jsonl -o out.jsonl -m Qwen/Qwen3-8B -c 256
      bullpen batch run jobs.jsonl -o out.jsonl -m ./mine -- --seed 1
    """
    check_options(model, options or ())
    from bullpen.cli.batching import Job, Wanted
    from bullpen.cli.console import new_console
    from bullpen.cli.validate import find_key
    from bullpen.client import Refused
    from bullpen.client.batch import check_batch

    try:
        before = check_batch(jobs, output)
    except InvalidRequestError as problem:
        raise WrongUsageError(str(problem)) from problem
    with connect(url, access_key) as client:
        folder = local_folder(model) if client.target.is_local else model
        key = api_key or find_key(options or (), {})
        wanted = Wanted(model, folder, options or (), gpus, key)
        job = Job(client, new_console(stderr=json_output), jobs, output, wanted, concurrency, grpc_address)
        try:
            done = job.go(before)
        except Refused as problem:
            raise AdvisedError(sentence(problem, way=make_room(client))) from problem
    if json_output:
        print_json(job.summary(done))
    return SOME_FAILED if done.failed else 0
