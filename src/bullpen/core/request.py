"""What a request may say: ids, options, variables. Refused here, it changes nothing."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from bullpen.core.instance import Config, Ladder, WarmUp
from bullpen.errors import InvalidRequestError

ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
RESERVED_IDS = frozenset({"watch"})
LOADER_VARIABLES = (
    "LD_*",
    "PYTHON*",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "BASH_ENV",
    "PATH",
    "NODE_OPTIONS",
    "CUDA_INJECTION64_PATH",
    "NVTX_INJECTION64_PATH",
)
"""Variables that make a program load other code than it would; each needs the operator's ``--allow-env``."""
SLEEP_KINDS = ("engine", "emulate", "off")
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
WARM_UP_PATH = re.compile(r"/v1(?:/[A-Za-z0-9_-]+)+")
"""Nothing that leads to the server's development endpoints or to its gate, which answer whoever is on this host."""
LONGEST_SECONDS = 10 * 365 * 24 * 3600
MOST_GPUS = 1024
MOST_BYTES = 64 * 1024
"""Options and variables together, as JSON. They reach the server's process in one message, variables twice."""


def check_id(instance_id: str) -> str:
    """Return the id.

    Raises:
        InvalidRequestError: it is none.
    """
    if ID.fullmatch(instance_id) is None or instance_id in RESERVED_IDS:
        raise InvalidRequestError(
            "an id has 1 to 128 of A-Z a-z 0-9 . _ -, does not begin with a dot and is not 'watch'", field="instance_id"
        )
    return instance_id


def split_options(options: str) -> tuple[str, ...]:
    """Split a command line as a POSIX shell splits words.

    Raises:
        InvalidRequestError: it cannot be split, or holds what no command line can.
    """
    if "\0" in options or _has_surrogate(options):
        raise InvalidRequestError("options hold a NUL or text that is no valid Unicode")
    try:
        return tuple(shlex.split(options))
    except ValueError as problem:
        raise InvalidRequestError(f"options cannot be split into words: {str(problem).lower()}") from problem


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def check_variables(variables: Mapping[str, Any], allowed: Collection[str] = ()) -> dict[str, str]:
    """Return the variables as text: a number or a boolean is taken as its JSON text.

    Raises:
        InvalidRequestError: a name or a value can be no environment variable, or a name needs an allowance.
    """
    return {check_name(name, allowed): check_value(name, value) for name, value in variables.items()}


def check_name(name: str, allowed: Collection[str]) -> str:
    """Return a variable's name, or refuse it."""
    if not name or "=" in name or "\0" in name or _has_surrogate(name):
        raise InvalidRequestError("a variable's name is not empty and holds no '=' and no NUL", field="env_vars")
    if name not in allowed and any(fnmatch.fnmatchcase(name, pattern) for pattern in LOADER_VARIABLES):
        raise InvalidRequestError(
            f"{name} changes how programs load; the daemon must be started with --allow-env {name}", field="env_vars"
        )
    return name


def check_value(name: str, value: Any) -> str:
    """Return a variable's value as text, or refuse it."""
    if isinstance(value, bool | int | float):
        try:
            return json.dumps(value, allow_nan=False)
        except ValueError as problem:
            raise InvalidRequestError(f"the value of {name} is no number that JSON has", field="env_vars") from problem
    if not isinstance(value, str) or "\0" in value or _has_surrogate(value):
        raise InvalidRequestError(
            f"the value of {name} must be text without NUL, a number or a boolean", field="env_vars"
        )
    return value


def check_size(of_options: int, of_variables: int) -> None:
    """Refuse what is too long to be handed over; sizes are in bytes of JSON."""
    if of_options + of_variables > MOST_BYTES:
        raise InvalidRequestError(
            f"options ({of_options} bytes) and env_vars ({of_variables}) are too long: {MOST_BYTES} bytes together is"
            " the most; put long values, such as a chat template, into a file",
            field="options" if of_options > of_variables else "env_vars",
        )


def check_annotations(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return the annotations, or refuse what could not be sent back."""
    if any(_has_surrogate(text) for pair in annotations.items() for text in pair):
        raise InvalidRequestError("annotations hold text that is no valid Unicode", field="annotations")
    return dict(annotations)


def read_seconds(value: float | str | None, field: str) -> float | None:
    """Return a length of time in seconds, given as a number or as text such as ``90s``, ``5m``, ``1h30m``.

    Raises:
        InvalidRequestError: it is none.
    """
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        seconds = value
    else:
        parts = DURATION.fullmatch(str(value).strip())
        if parts is None or not any(parts.groups()):
            raise InvalidRequestError(f"{field} is a number of seconds, or text such as 90s, 5m or 1h30m", field=field)
        hours, minutes, rest = (float(part or 0) for part in parts.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    if seconds is not None and not 0 <= seconds <= LONGEST_SECONDS:
        raise InvalidRequestError(f"{field} is between 0 and {LONGEST_SECONDS} seconds", field=field)
    return None if seconds is None else float(seconds)


def check_gpus(uuids: Collection[str] | None, count: int | None, share: float | None) -> None:
    """Refuse a claim of accelerators that contradicts itself."""
    if uuids is not None and len(set(uuids)) != len(uuids):
        raise InvalidRequestError("a GPU is named twice", field="gpu_uuids")
    if uuids and count is not None:
        raise InvalidRequestError("give gpu_uuids to name GPUs, or gpus for a number of them, not both", field="gpus")
    if count is not None and not 1 <= count <= MOST_GPUS:
        raise InvalidRequestError(f"gpus is between 1 and {MOST_GPUS}", field="gpus")
    if share is None:
        return
    if not 0 < share <= 1:
        raise InvalidRequestError("gpu_share is above 0 and at most 1", field="gpu_share")
    if not uuids and count is None:
        raise InvalidRequestError("gpu_share says how much of which GPU: give gpu_uuids or gpus too", field="gpu_share")


def read_warm_up(given: Mapping[str, Any] | None) -> WarmUp | None:
    """The warm-up request, or a refusal of it."""
    if given is None:
        return None
    path, body = given.get("path", "/v1/completions"), given.get("body", {})
    if not isinstance(path, str) or WARM_UP_PATH.fullmatch(path) is None:
        raise InvalidRequestError(
            "warm_up.path is one of the model's own, such as /v1/completions: it begins with /v1/", field="warm_up"
        )
    try:
        text = json.dumps(body, allow_nan=False)
    except (ValueError, TypeError) as problem:
        raise InvalidRequestError(f"warm_up.body is no JSON: {problem}", field="warm_up") from problem
    if len(text) > MOST_BYTES:
        raise InvalidRequestError(f"warm_up.body has at most {MOST_BYTES} bytes", field="warm_up")
    return WarmUp(path, text)


def read_ladder(fields: Mapping[str, Any]) -> Ladder:
    """When it steps down, or a refusal of that."""
    times = {name: read_seconds(fields.get(name), name) for name in ("sleep_after", "discard_after", "stop_after")}
    given = [(name, seconds) for name, seconds in times.items() if seconds is not None]
    for (earlier, first), (later, second) in itertools.pairwise(given):
        if first > second:
            raise InvalidRequestError(f"{earlier} is not longer than {later}: a model steps down in order", field=later)
    return Ladder(**times, pin=bool(fields.get("pin") or False), priority=int(fields.get("priority") or 0))


def read_config(
    options: str,
    *,
    env_vars: Mapping[str, Any] | None = None,
    gpu_uuids: Collection[str] | None = None,
    annotations: Mapping[str, str] | None = None,
    engine: str,
    face: str = "v2",
    allowed: Collection[str] = (),
    gpus: int | None = None,
    gpu_share: float | None = None,
    sleep: str | None = None,
    warm_up: Mapping[str, Any] | None = None,
    **ladder: Any,
) -> Config:
    """Check what can be checked without the engine and return the configuration.

    Args:
        ladder: ``sleep_after``, ``discard_after``, ``stop_after`` (see `read_seconds`), ``pin``, ``priority``.

    Raises:
        InvalidRequestError: a field can never work.
    """
    check_size(len(options), 0)  # to split takes longest of all
    argv = split_options(options)
    variables = None if env_vars is None else check_variables(env_vars, allowed)
    check_size(len(json.dumps(argv)), len(json.dumps(variables or {})))
    check_gpus(gpu_uuids, gpus, gpu_share)
    if sleep not in (None, *SLEEP_KINDS):
        raise InvalidRequestError(f"sleep is one of {', '.join(SLEEP_KINDS)}", field="sleep")
    for name in ("sleep_after", "discard_after"):
        if sleep == "off" and ladder.get(name) is not None:
            raise InvalidRequestError(f"sleep is off, so {name} cannot be; stop_after can", field=name)
    return Config(
        options=options,
        argv=argv,
        env_vars=variables,
        gpu_uuids=None if gpu_uuids is None else tuple(gpu_uuids),
        annotations=None if annotations is None else check_annotations(annotations),
        engine=engine,
        face=face,
        gpus=gpus,
        gpu_share=gpu_share,
        sleep=sleep,
        ladder=read_ladder(ladder),
        warm_up=read_warm_up(warm_up),
    )
