"""The command line of one instance: vLLM's, of which the simulator reads a small part and takes the rest as given."""

import json
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bullpen.sim.flags import TAKES_JSON, TAKES_NO_VALUE, TAKES_SEVERAL_VALUES

DEFAULT_PORT = 8000

# What one flag was given: a word, several words, or whether a flag without a value was set.
FlagValue = str | tuple[str, ...] | bool

_OWN_SINGLE_VALUE = frozenset({"--model", "--host", "--port", "--uds", "--max-model-len"})
_SIZES = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")
_UTILIZATION = "--gpu-memory-utilization"
_OTHER_NAMES = {
    **dict(zip(("-tp", "-pp", "-dp"), _SIZES, strict=True)),
    "--device-memory-utilization": _UTILIZATION,
}
# What older releases call `--runner pooling`, in part or whole.
_POOLING_TASKS = frozenset({"classify", "embed", "embedding", "reward", "score"})
_OWN = _OWN_SINGLE_VALUE | {"--served-model-name", "--enable-sleep-mode", "--api-key"}
_NEVER_LOGGED = frozenset({"--api-key", "--hf-token", "--watermark-config"})
_MOST_PORT = 65_535
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")
_HUMAN_INTEGER = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
_MULTIPLIERS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OptionsError(ValueError):
    """The command line cannot be used; the message is one plain sentence that says what to change."""


@dataclass(frozen=True)
class SimOptions:
    """What the simulator was told on its command line.

    `host` and `port` are None where the command line does not name them (a server then listens on every address,
    port `DEFAULT_PORT`); `max_model_len` is in tokens, None where it is not set. `devices` is how many accelerators
    the tensor, pipeline and data parallel sizes make, `utilization` the share of their memory that is asked for (None
    where it is not set). A `pooling` model gives embeddings and writes no text. `given` lists every flag as it came,
    secrets replaced by `***`, for the log.
    """

    model: str
    host: str | None
    port: int | None
    served_model_names: tuple[str, ...]
    enable_sleep_mode: bool
    api_key: tuple[str, ...]
    uds: str | None
    max_model_len: int | None
    devices: int
    utilization: float | None
    pooling: bool
    given: tuple[tuple[str, FlagValue], ...]


def parse(argv: Sequence[str], known_flags: frozenset[str] | None = None) -> SimOptions:
    """Read a vLLM command line (without the program's name).

    With `known_flags` (`--max-model-len`, `-tp`, …: every flag that the installed vLLM has) a flag outside that set is
    refused, as vLLM's parser does; without it, unknown flags are taken as they come.

    Raises OptionsError.
    """
    flags, positional = _scan(argv, None if known_flags is None else frozenset(map(_canonical, known_flags)))
    if len(positional) > 1:
        raise OptionsError(f"unrecognized arguments: {' '.join(positional[1:])}")
    model = positional[0] if positional else _single(flags, "--model")
    if not model:
        raise OptionsError("no model given: name one with --model NAME or as the first word")
    if positional:
        flags["--model"] = model
    _check_json(flags)
    return SimOptions(
        model=model,
        host=_single(flags, "--host") or None,
        port=_port(_single(flags, "--port")),
        served_model_names=_several(flags, "--served-model-name") or (model,),
        enable_sleep_mode=flags.get("--enable-sleep-mode") is True,
        api_key=_several(flags, "--api-key"),
        uds=_single(flags, "--uds") or None,
        max_model_len=_max_model_len(_single(flags, "--max-model-len")),
        devices=math.prod(_size(name, _single(flags, name)) for name in _SIZES),
        utilization=_utilization(_single(flags, _UTILIZATION)),
        pooling=_is_pooling(flags),
        given=tuple(
            (name.lstrip("-").replace("-", "_"), "***" if name in _NEVER_LOGGED else value)
            for name, value in flags.items()
        ),
    )


def _scan(argv: Sequence[str], known: frozenset[str] | None) -> tuple[dict[str, FlagValue], list[str]]:
    """Split a command line into flags (the last of a kind wins) and positional words."""
    words = deque(argv)
    flags: dict[str, FlagValue] = {}
    positional: list[str] = []
    while words:
        word = words.popleft()
        if word == "--":
            positional.extend(words)
            break
        if not _is_flag(word):
            positional.append(word)
            continue
        name, attached = _split_flag(word)
        if name in {"--help", "-h", "--version"}:
            raise OptionsError(f"{name} starts no server: leave it out")
        if known is not None and not _is_known(name, known):
            raise OptionsError(f"unrecognized arguments: {word}")
        negated = name.startswith("--no-")
        if not negated and name not in TAKES_NO_VALUE:
            flags[name] = _value(name, attached, words)
        elif attached is not None:
            raise OptionsError(f"argument {name}: takes no value, but was given {attached!r}")
        else:
            flags["--" + name.removeprefix("--no-") if negated else name] = not negated
    return flags, positional


def _value(name: str, attached: str | None, words: deque[str]) -> FlagValue:
    """Take the value of flag `name` off the front of `words`, unless it was attached with `=`."""
    if name in TAKES_SEVERAL_VALUES:
        values = [] if attached is None else [attached]
        while attached is None and words and not _is_flag(words[0]):
            values.append(words.popleft())
        if not values:
            raise OptionsError(f"argument {name}: expected at least one value")
        return tuple(values)
    if attached is not None:
        return attached
    if words and not _is_flag(words[0]):
        return words.popleft()
    if name in _OWN_SINGLE_VALUE:
        raise OptionsError(f"argument {name}: expected one value")
    return True


def _is_flag(word: str) -> bool:
    """Whether argparse would take `word` for a flag: negative numbers and words with a space are values."""
    name = word.partition("=")[0]
    return len(word) > 1 and word[0] == "-" and " " not in name and not _NEGATIVE_NUMBER.fullmatch(word)


def _split_flag(word: str) -> tuple[str, str | None]:
    """Split `--name=value` into its canonical name and its value; `-O3` is `-O` with the value 3."""
    if word.startswith("-O") and word[2:3].isalnum():
        return "-O", word[2:]
    name, equals, value = word.partition("=")
    return _canonical(name), value if equals else None


def _canonical(flag: str) -> str:
    """`--max_model_len` and `--max-model-len` are one flag, and so are `-tp` and `--tensor-parallel-size`.

    The part after a dot names a key and stays as it is.
    """
    name, dot, key = flag.partition(".")
    name = name.replace("_", "-")
    return _OTHER_NAMES.get(name, name) + dot + key


def _is_known(name: str, known: frozenset[str]) -> bool:
    base = name.partition(".")[0]
    return base in known or base in _OWN or "--" + base.removeprefix("--no-") in known


def _single(flags: dict[str, FlagValue], name: str) -> str | None:
    value = flags.get(name)
    return value if isinstance(value, str) else None


def _several(flags: dict[str, FlagValue], name: str) -> tuple[str, ...]:
    value = flags.get(name)
    return value if isinstance(value, tuple) else ()


def _port(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise OptionsError(f"argument --port: invalid int value: {text!r}")
    port = int(text)
    if not 0 <= port <= _MOST_PORT:
        raise OptionsError(f"argument --port: {port} is no port number: choose one from 1 to {_MOST_PORT}")
    return port


def _max_model_len(text: str | None) -> int | None:
    if text is None or text in {"-1", "auto"}:
        return None
    match = _HUMAN_INTEGER.fullmatch(text)
    tokens = float(match[1]) * _MULTIPLIERS.get(match[2], 1) if match else 0.0
    if tokens < 1 or not tokens.is_integer():
        raise OptionsError(
            f"argument --max-model-len: {text!r} is no number of tokens: give a whole number, like 4096 or 8k"
        )
    return int(tokens)


def _size(name: str, text: str | None) -> int:
    if text is None:
        return 1
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise OptionsError(f"argument {name}: {text!r} is no number of devices: give a whole number from 1")
    return int(text)


def _utilization(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise OptionsError(f"argument {_UTILIZATION}: {text!r} is no share of the memory: give more than 0, at most 1")
    return share


def _is_pooling(flags: dict[str, FlagValue]) -> bool:
    task = _single(flags, "--task")
    return _single(flags, "--runner") == "pooling" or _single(flags, "--convert") == "embed" or task in _POOLING_TASKS


def _check_json(flags: dict[str, FlagValue]) -> None:
    for name, value in flags.items():
        for text in value if isinstance(value, tuple) else (value,):
            if name not in TAKES_JSON or not isinstance(text, str) or not text.lstrip().startswith("{"):
                continue
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                raise OptionsError(f"argument {name}: the value is not valid JSON ({error}): {text[:200]}") from None
