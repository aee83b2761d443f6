"""``bullpen serve``: the daemon.

It must answer soon after it is typed, so nothing is imported here that the daemon itself does not need.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bullpen.cli.common import WrongUsageError, complain
from bullpen.errors import StateError

LISTEN, INSTANCES, SLEEP, GPUS = "Listening", "Instances", "Sleep", "GPUs"
CANNOT_START = 2
"""The daemon's exit code where something is in its way, such as the owner of its port."""


def serve(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A YAML file with any of these settings.")] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Journal, logs, sockets and key, mode 0700. Default: $XDG_STATE_HOME/bullpen."
        ),
    ] = None,
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug"] | None,
        typer.Option(metavar="LEVEL", help="critical, error, warning, info (default) or debug."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address of REST API, page and gRPC. Default: 0.0.0.0.", rich_help_panel=LISTEN)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Its port; 0 picks one. Default: 8001.", rich_help_panel=LISTEN)
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Port of gRPC; 0 turns it off. Default: the one after --port.", rich_help_panel=LISTEN),
    ] = None,
    grpc_tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of gRPC's certificate chain. Default: no TLS for it.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    grpc_tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of its private key.", rich_help_panel=LISTEN)
    ] = None,
    grpc_limit_message_size: Annotated[
        bool | None,
        typer.Option(
            "--grpc-limit-message-size", help="Refuse gRPC messages of more than 4 MiB.", rich_help_panel=LISTEN
        ),
    ] = None,
    access_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the admin key; the variable BULLPEN_ACCESS_KEY can hold the key itself. Default: no key,"
            " and callers on this host alone.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool | None,
        typer.Option(
            "--allow-unauthenticated",
            help="Answer remote callers although there is no key: behind a network policy only.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    engine: Annotated[
        Literal["vllm", "sim"] | None,
        typer.Option(
            metavar="NAME",
            help="Engine of instances that name none: vllm (default), or sim, a simulator.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    engine_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Interpreter the engine runs in. Default: this one.", rich_help_panel=INSTANCES
        ),
    ] = None,
    instance_host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Where servers listen whose options name no --host. Default: 127.0.0.1.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    allow_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A variable that instances may set although it changes how programs load. Repeatable.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    spares: Annotated[
        int | None,
        typer.Option(help="Processes forked ahead, waiting for a model. Default: 1.", rich_help_panel=INSTANCES),
    ] = None,
    start_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a start may go without progress. Default: 1800.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    stop_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="From SIGTERM to SIGKILL for an instance. Default: 10.", rich_help_panel=INSTANCES
        ),
    ] = None,
    sleep_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="How long an engine may take to sleep. Default: 120.", rich_help_panel=SLEEP
        ),
    ] = None,
    wake_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="And to wake. Default: 300.", rich_help_panel=SLEEP),
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long requests in flight may take to end before a sleep. Default: 60.",
            rich_help_panel=SLEEP,
        ),
    ] = None,
    memory_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a start or wake waits for memory on a GPU to be free. Default: 30.",
            rich_help_panel=SLEEP,
        ),
    ] = None,
    turn_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long it waits for others that start, sleep or wake on its GPUs. Default: 3600.",
            rich_help_panel=SLEEP,
        ),
    ] = None,
    host_memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory that sleeping instances may keep altogether: MiB, or as in 32GiB. Default: no limit.",
            rich_help_panel=SLEEP,
        ),
    ] = None,
    on_exit: Annotated[
        Literal["stop", "keep"] | None,
        typer.Option(
            metavar="stop|keep",
            help="What SIGTERM to the daemon does to instances. Default: stop.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    log_cap: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            help="How much of each instance's log is kept; 0 keeps all. Default: 256 MiB.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where new instances' logs go; those there are stay where they are. Default: logs in the state"
            " directory.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    log_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            help="What GET /logs gives of a log at most. Default: 1048576, which is also the most.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    mock_gpus: Annotated[
        bool | None,
        typer.Option("--mock-gpus", help="Pretend to have GPUs named GPU-0 …", rich_help_panel=GPUS),
    ] = None,
    mock_gpu_count: Annotated[
        int | None, typer.Option(metavar="N", help="How many. Default: 8.", rich_help_panel=GPUS)
    ] = None,
    mock_gpu_memory: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="The memory of each. Default: 81920.", rich_help_panel=GPUS),
    ] = None,
) -> int:
    """Run the daemon: warm the engine up, and start servers from it on request.

    Each setting is also a variable, BULLPEN_ and the flag in capitals, and a key of the YAML file.
    The command line goes before the environment, the environment before the file.

    \b
    Examples:
      bullpen serve
      bullpen serve --port 9000 --engine sim
      BULLPEN_ACCESS_KEY=secret bullpen serve --config /etc/bullpen.yaml
    """
    flags = {name: value for name, value in locals().items() if name != "config" and value not in (None, [])}
    return start(flags, config)


def start(flags: Mapping[str, Any], config: Path | None) -> int:
    """Put the settings together, run the daemon and return its exit code.

    Args:
        flags: settings that go before the environment and the file.
        config: the YAML file; None: the one that the environment names, if any.

    Raises:
        WrongUsageError: the settings are wrong.
    """
    # Imports make much that stays and little garbage: looking for it meanwhile is a tenth of the daemon's start.
    gc.disable()
    try:
        from bullpen.node.settings import load

        settings = load(flags, config)
        if not settings.mock_gpus and flags.keys() & {"mock_gpu_count", "mock_gpu_memory"}:
            raise StateError("--mock-gpu-count and --mock-gpu-memory are about mock GPUs; give --mock-gpus too")
        from bullpen.daemon.serve import serve as run_daemon
    except StateError as problem:
        raise WrongUsageError(str(problem)) from problem
    finally:
        gc.enable()
    code = run_daemon(settings)
    if code == CANNOT_START and settings.port:
        from bullpen.cli.checks.daemon import is_bullpen

        logging.disable()  # what the question itself would log is nobody's concern
        if is_bullpen(settings.host, settings.port):
            complain("another Bullpen daemon has that port")
    return code
