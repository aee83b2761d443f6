"""The keywords of ``vllm.LLM`` as options of ``vllm serve``: what a launch asks for, as a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from bullpen.errors import LaunchRefusedError

Task = Literal["generate", "embed"]

KEYWORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def command_line(model: str, task: Task, extra_kwargs: Mapping[str, Any], gpu_count: int) -> list[str]:
    """The options of ``vllm serve`` that say what a launch says to ``vllm.LLM``.

    Raises:
        LaunchRefusedError: a keyword is none, or a value has no place on a command line.
    """
    given = {keyword(name): value for name, value in extra_kwargs.items()}
    ours: dict[str, Any] = {"model": model}
    if gpu_count:
        ours["tensor_parallel_size"] = gpu_count
    if task == "embed":
        ours["runner"] = "pooling"
        if "runner" not in given:
            ours["convert"] = "embed"
    options = ours | given
    return [word for name, value in options.items() for word in option("--" + name.replace("_", "-"), value)]


def keyword(name: str) -> str:
    """A keyword as Python spells it."""
    if KEYWORD.fullmatch(name) is None:
        raise LaunchRefusedError("extra_kwargs has a name that is no keyword of vllm.LLM: letters, digits and _")
    return name.replace("-", "_")


def option(flag: str, value: Any) -> list[str]:
    """One keyword's words; a value of None leaves the matter to vLLM."""
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        return [flag, *(word(flag, one) for one in value)]
    text = word(flag, value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def word(flag: str, value: Any) -> str:
    """A value as one word of a command line."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as problem:
        raise LaunchRefusedError(f"extra_kwargs has a value for {flag} that is no JSON: {problem}") from problem
