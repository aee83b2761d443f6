"""The command line: ``bullpen``, one file for each command.

Modules of commands import nothing heavy before the command runs, so that ``bullpen serve`` answers early; see
`bullpen.cli.common` for what they share.

Exit codes: 0 done; 1 it did not work; 2 the command line or the settings are wrong; 130 ended by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer

from bullpen import __version__
from bullpen.cli import batch, demo, doctor, explain, logs, ps, run, serve, sleep, stop, swap, top, validate
from bullpen.cli.common import INTERRUPTED, WrongUsageError, complain
from bullpen.cli.hints import sentence
from bullpen.errors import BullpenError

app = typer.Typer(
    name="bullpen",
    help="Keeps vLLM warmed up and puts any model on your accelerators in seconds.",
    epilog="Start with `bullpen serve` in one terminal and `bullpen run MODEL` in another, or with `bullpen demo`.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: Mapping[str, Callable[..., int]] = {
    "serve": serve.serve,
    "run": run.run,
    "ps": ps.ps,
    "logs": logs.logs,
    "top": top.top,
    "explain": explain.explain,
    "sleep": sleep.sleep,
    "wake": sleep.wake,
    "swap": swap.swap,
    "stop": stop.stop,
    "validate": validate.validate,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(batch.app, name="batch")


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"bullpen {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def bullpen(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Keeps vLLM warmed up and puts any model on your accelerators in seconds."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; expected errors are one line on stderr."""
    try:
        code = app(args=arguments, prog_name="bullpen", standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except typer.TyperException as problem:
        text = problem.format_message()
        complain(f"{text.rstrip('.?')}. {hint_for(text, sys.argv[1:] if arguments is None else arguments)}")
        return problem.exit_code
    except WrongUsageError as problem:
        complain(str(problem))
        return 2
    except BullpenError as problem:
        complain(sentence(problem))
        return 1
    except BrokenPipeError:
        # Whoever read our output has gone. What is left in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def hint_for(text: str, arguments: Sequence[str]) -> str:
    """What to try after a usage error."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    if name == "batch":
        return "See `bullpen batch run --help`."
    if name in ("run", "validate") and text.startswith("No such option"):
        return f"vLLM's own options go behind `--`, as in `bullpen {name} MODEL -- --max-model-len 4096`."
    return f"See `bullpen {name} --help`." if name in COMMANDS else "See `bullpen --help`."
