"""``bullpen validate``: does a model sleep and wake here, and is it itself afterwards?"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bullpen.cli.common import JsonOption, KeyOption, UrlOption, connect, print_json
from bullpen.cli.run import check_options, local_folder, read_variables

if TYPE_CHECKING:
    from bullpen.cli.validating import Judged, Validation

MARKS = {"works": ("✓", "green"), "differs": ("✗", "red"), "fails": ("✗", "red"), "not available": ("-", "dim")}


def validate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name on Hugging Face, or its folder.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Options of `vllm serve`, behind `--`.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="A variable for the server. Repeatable.")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option("--gpu", metavar="GPU", help="A GPU for it, by UUID or index. Repeatable.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many GPUs of Bullpen's choice. Default: 1 where there are any."),
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="vllm or sim. Default: the daemon's.")] = None,
    json_output: JsonOption = False,
    url: UrlOption = None,
    access_key: KeyOption = None,
) -> int:
    """Try whether a model sleeps and wakes here, and answers as before.

    It starts the model, asks it something, takes it through each kind of sleep that there is, and asks again each time.
    Times and memory are measured. The daemon remembers for the model what each level came to, and its ladder skips
    what does not work. Exit code 1 if something that is available does not work. The instance is removed in the end.

    \b
    Examples:
      bullpen validate facebook/opt-125m
      bullpen validate Qwen/Qwen3-8B --gpus 1 -- --max-model-len 4096
    """
    variables = read_variables(env or [])
    check_options(model, options or ())
    from bullpen.cli import words
    from bullpen.cli.validating import Validation, is_well, verdict

    with connect(url, access_key) as client:
        if client.target.is_local:
            model = local_folder(model)
        taken = {instance.instance_id for instance in client.list().instances}
        name = words.name_for(f"validate-{words.name_for(model, ())}", taken)
        if gpu is None and gpus is None and client.gpus().gpus:
            gpus = 1
        fields = {"env_vars": variables or None, "gpu_uuids": gpu, "gpus": gpus, "engine": engine}
        line = shlex.join(["--model", model, *(options or [])])
        with progress(name) as tell:
            validation = Validation(client, name, line, fields, find_key(options or (), variables), tell)
            validation.run()
    well, said = is_well(validation.steps), verdict(model, validation.steps)
    if json_output:
        steps = [step.document() for step in validation.steps]
        why = validation.why_emulated or None
        stored = [judged.document() for judged in validation.judged]
        document = {"model": model, "ok": well, "verdict": said, "why_emulated": why, "steps": steps, "stored": stored}
        print_json(document)
    else:
        show(validation, said, well)
    return 0 if well else 1


def find_key(options: Sequence[str], variables: Mapping[str, str]) -> str | None:
    """The API key that the server will want."""
    for place, word in enumerate(options):
        if word.startswith("--api-key="):
            return word.partition("=")[2]
        if word == "--api-key" and place + 1 < len(options):
            return options[place + 1]
    return variables.get("VLLM_API_KEY")


@contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being done: in one line on a terminal, in a line for each thing elsewhere."""
    from rich.text import Text

    from bullpen.cli.console import new_console

    console = new_console(stderr=True)
    told: list[str] = []

    def tell_line(text: str) -> None:
        line = text.partition(", about ")[0]
        if line not in told[-1:]:
            told.append(line)
            console.print(f"{name}: {line}", soft_wrap=True)

    if not console.is_terminal or console.is_dumb_terminal:
        yield tell_line
        return
    with console.status(Text(name)) as status:
        yield lambda text: status.update(Text.assemble((name, "bold"), f": {text}"))


def show(validation: Validation, said: str, well: bool) -> None:
    """Print the verdict for people."""
    from rich.table import Table
    from rich.text import Text

    from bullpen.cli import words
    from bullpen.cli.console import new_console

    console, steps, why_emulated = new_console(), validation.steps, validation.why_emulated
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("STEP", "VERDICT", "TIME", "GPU MiB", "HOST MiB"):
        table.add_column(heading, justify="left" if heading in ("STEP", "VERDICT") else "right", no_wrap=True)
    for step in steps:
        mark, colour = MARKS[step.outcome]
        timed = step.seconds is not None
        cells: list[Any] = [step.name, Text(f"{mark} {step.outcome}", colour)]
        cells += [words.duration(step.seconds or 0.0) if timed else "", number(step.gpu_mib), number(step.host_mib)]
        table.add_row(*cells)
    console.print(table)
    details = {step.detail: step for step in reversed(steps) if step.detail and step.detail != why_emulated}
    for detail, step in reversed(details.items()):
        console.print(Text(f"{step.name}: {detail}", "yellow"))
    if why_emulated:
        console.print(Text(f"The engine's own sleep was not tried: {why_emulated}", "yellow"))
    kept = [judged_words(judged) for judged in validation.judged if not judged.problem]
    if kept:
        console.print(Text(f"Stored for the ladder: {', '.join(kept)}."))
    for judged in validation.judged:
        if judged.problem:
            console.print(Text(f"Not stored for the ladder: {judged_words(judged)}: {judged.problem}", "yellow"))
    console.print(Text(said, "bold green" if well else "bold red"))


def judged_words(judged: Judged) -> str:
    """Whether a level works."""
    return f"{judged.kind} {'works' if judged.works else 'does not work'}"


def number(amount: int | None) -> str:
    """An amount of memory in a table."""
    return "" if amount is None else str(amount)
