"""``vllm-bootstrap``: the daemon with that system's ports and variables.

Everything else of ``bullpen serve`` holds here too: ``BULLPEN_…`` variables, YAML file, the rules on who may call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bullpen import __version__
from bullpen.cli import serve
from bullpen.cli.common import INTERRUPTED, WrongUsageError, complain
from bullpen.errors import BullpenError
from bullpen.node.characters import LEAST_PIECE, check_text

PORT = 8000
MOST_CHUNK = 1024 * 1024
YES, NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
LISTEN, INSTANCES = "Listening", "Instances"


def read_port(text: str) -> int:
    """A port; 0 has the same meaning as for the flag."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError("give a port, a number from 0 to 65535")
    return int(text)


def read_seconds(text: str) -> float:
    """A time in seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise ValueError("give a number of seconds, such as 10")
    return seconds


def read_switch(text: str) -> bool:
    """Yes or no."""
    if text.lower() not in YES + NO:
        raise ValueError("give true or false")
    return text.lower() in YES


def read_chunk(text: str) -> int:
    """The size of a piece of log in bytes. More than what is read at once is no mistake: pieces are smaller then."""
    if not text.isascii() or not text.isdigit() or int(text) < LEAST_PIECE:
        raise ValueError(f"give a number of bytes, {LEAST_PIECE} or more, such as {MOST_CHUNK}")
    return min(int(text), MOST_CHUNK)


@dataclass(frozen=True)
class Variable:
    """A variable of that system.

    Attributes:
        setting: the daemon's setting that it fills.
        read: makes the value of its text; raises ValueError with what to write in its place.
    """

    setting: str
    read: Callable[[str], Any]


VARIABLES: Mapping[str, Variable] = {
    "VLLM_BOOTSTRAP_HOST": Variable("host", check_text),
    "VLLM_BOOTSTRAP_PORT": Variable("port", read_port),
    "VLLM_GRPC_PORT": Variable("grpc_port", read_port),
    "VLLM_GRPC_LIMIT_MESSAGE_SIZE": Variable("grpc_limit_message_size", read_switch),
    "VLLM_BOOTSTRAP_LOG_DIR": Variable("log_dir", Path),
    "VLLM_ACCESS_KEY": Variable("access_key", check_text),
    "VLLM_STOP_TIMEOUT_SECONDS": Variable("stop_timeout", read_seconds),
    "VLLM_LOG_READ_CHUNK_BYTES": Variable("log_chunk", read_chunk),
}


def take_variables(environ: MutableMapping[str, str]) -> dict[str, Any]:
    """The settings that the variables hold. They are removed: what the daemon starts inherits none of them.

    Names are read in any case, the exact one before others; values are trimmed, and a blank one is as good as none.

    Raises:
        WrongUsageError: a value is wrong.
    """
    found: dict[str, str] = {}
    for name in sorted(name for name in environ if name.upper() in VARIABLES):
        text = environ.pop(name).strip()
        if text:
            found.setdefault(name.upper(), text)  # capitals sort first
    settings: dict[str, Any] = {}
    for name, text in found.items():
        variable = VARIABLES[name]
        try:
            settings[variable.setting] = variable.read(text)
        except ValueError as problem:
            shown = "" if variable.setting == "access_key" else f" is {text!r}"
            raise WrongUsageError(f"{name}{shown}: {problem}") from None
    return settings


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"vllm-bootstrap (bullpen {__version__})")
        raise typer.Exit


def bootstrap(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address of REST API, page and gRPC; VLLM_BOOTSTRAP_HOST. Default: 0.0.0.0.", rich_help_panel=LISTEN
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port of the REST API; VLLM_BOOTSTRAP_PORT. Default: 8000.", rich_help_panel=LISTEN),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            help="Port of gRPC, 0 turns it off; VLLM_GRPC_PORT. Default: the one after --port.", rich_help_panel=LISTEN
        ),
    ] = None,
    grpc_limit_message_size: Annotated[
        bool | None,
        typer.Option(
            "--grpc-limit-message-size",
            help="Refuse gRPC messages of more than 4 MiB; VLLM_GRPC_LIMIT_MESSAGE_SIZE.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    access_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the access key; VLLM_ACCESS_KEY can hold the key itself. Default: no key, and callers on"
            " this host alone.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool | None,
        typer.Option(
            "--allow-unauthenticated",
            help="Answer remote callers although there is no key: behind a firewall only.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    engine: Annotated[
        Literal["vllm", "sim"] | None,
        typer.Option(metavar="NAME", help="vllm (default), or sim, a simulator.", rich_help_panel=INSTANCES),
    ] = None,
    stop_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="From SIGTERM to SIGKILL for an instance; VLLM_STOP_TIMEOUT_SECONDS. POST /stop takes 4 at most."
            " Default: 10.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where new instances' logs go; VLLM_BOOTSTRAP_LOG_DIR. Default: logs in the state directory.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    log_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            help="What GET /logs gives of a log at most; VLLM_LOG_READ_CHUNK_BYTES. Default: 1048576.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Journal, logs, sockets and key. Default: $XDG_STATE_HOME/bullpen."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML file with settings of `bullpen serve`, all but `port`."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> int:
    """Run the daemon on vllm-bootstrap's ports: REST on 8000, gRPC on 8001.

    The options name the variables that set the same; names of variables are read in any case. The command line goes
    before them, they before BULLPEN_ variables (`bullpen serve --help`), those before the YAML file.

    \b
    Examples:
      VLLM_ACCESS_KEY=secret vllm-bootstrap
      vllm-bootstrap --port 9000
    """
    given = locals()
    flags = {name: given[name] for name in given if name not in ("config", "version") and given[name] is not None}
    settings = {**take_variables(os.environ), **flags}
    if "port" not in settings and not os.environ.get("BULLPEN_PORT"):
        settings["port"] = PORT
    return serve.start(settings, config)


app = typer.Typer(
    name="vllm-bootstrap",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(bootstrap)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon and return the exit code; expected errors are one line on stderr."""
    try:
        code = app(args=arguments, prog_name="vllm-bootstrap", standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except typer.TyperException as problem:
        complain(f"{problem.format_message().rstrip('.?')}. See `vllm-bootstrap --help`.")
        return problem.exit_code
    except WrongUsageError as problem:
        complain(str(problem))
        return 2
    except BullpenError as problem:
        complain(str(problem))
        return 1
    return code if isinstance(code, int) else 0
