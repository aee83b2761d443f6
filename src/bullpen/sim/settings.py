"""What the simulator does, set by its environment: delays, failures and sizes (`BULLPEN_SIM_*`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FAILURES = (
    "start",
    "health",
    "sleep",
    "wake",
    "request",
    "answer",
    "sleep_hang",
    "wake_hang",
    "sleep_exit",
    "wake_exit",
)


class SettingsError(ValueError):
    """A variable of the environment has a value that cannot be used; the message names it and says what fits."""


@dataclass(frozen=True)
class Settings:
    """The delays, failures and sizes of one simulator.

    Times are in seconds, memory in MiB. `fail` holds the words of `FAILURES` that were asked for: `sleep` and `wake`
    answer with an error status, `sleep_hang` and `wake_hang` never answer, at `sleep_exit` and `wake_exit` the engine
    child dies in the middle, with `answer` completions and embeddings are wrong after the first wake. `fail_file` is a
    file with more such words, which may come and go while the server runs, or None. `exit_after` counts from the start
    of the process and is None where the process does not end by itself. `stubborn` is 0, 1 (the engine child ignores
    SIGTERM and outlives its parent) or 2 (the server process ignores SIGTERM too). `gpu_folders` are those of
    `bullpen.sim.gpus`, one for each mock GPU that the process may see. `development_mode` and `api_key` are vLLM's own
    variables `VLLM_SERVER_DEV_MODE` and `VLLM_API_KEY`.
    """

    start_seconds: float
    sleep_seconds: float
    wake_seconds: float
    awake_mib: int
    asleep_mib: int
    tokens_per_second: float
    fail: frozenset[str]
    fail_file: Path | None
    exit_after: float | None
    exit_code: int
    stubborn: int
    log_bytes: int
    gpu_folders: tuple[Path, ...]
    development_mode: bool
    api_key: str | None

    def fails(self, word: str) -> bool:
        """Whether this failure is asked for, at this moment."""
        if word in self.fail or self.fail_file is None:
            return word in self.fail
        try:
            return word in _words(self.fail_file.read_text())
        except (OSError, ValueError):
            return False


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from an environment; a variable that is unset or empty has its default.

    Raises SettingsError.
    """
    tokens_per_second = _number(environ, "BULLPEN_SIM_TOKENS_PER_SECOND", 1000.0)
    if tokens_per_second == 0:
        raise SettingsError("BULLPEN_SIM_TOKENS_PER_SECOND is 0, so that no request would ever end: give more than 0")
    fail = environ.get("BULLPEN_SIM_FAIL", "")
    if not _words(fail).issubset(FAILURES):
        raise SettingsError(
            f"BULLPEN_SIM_FAIL is {fail!r}: give one of {', '.join(FAILURES)}, or several of them with commas between, "
            "or leave it unset"
        )
    fail_file = environ.get("BULLPEN_SIM_FAIL_FILE")
    return Settings(
        start_seconds=_number(environ, "BULLPEN_SIM_START_SECONDS", 0.05),
        sleep_seconds=_number(environ, "BULLPEN_SIM_SLEEP_SECONDS", 0.02),
        wake_seconds=_number(environ, "BULLPEN_SIM_WAKE_SECONDS", 0.02),
        awake_mib=_whole(environ, "BULLPEN_SIM_AWAKE_MIB", 1024),
        asleep_mib=_whole(environ, "BULLPEN_SIM_ASLEEP_MIB", 64),
        tokens_per_second=tokens_per_second,
        fail=_words(fail),
        fail_file=Path(fail_file) if fail_file else None,
        exit_after=_number(environ, "BULLPEN_SIM_EXIT_AFTER", 0.0) if environ.get("BULLPEN_SIM_EXIT_AFTER") else None,
        exit_code=_whole(environ, "BULLPEN_SIM_EXIT_CODE", 1, most=255),
        stubborn=_whole(environ, "BULLPEN_SIM_STUBBORN", 0, most=2),
        log_bytes=_whole(environ, "BULLPEN_SIM_LOG_BYTES", 0),
        gpu_folders=_gpu_folders(environ),
        development_mode=_whole(environ, "VLLM_SERVER_DEV_MODE", 0) != 0,
        api_key=environ.get("VLLM_API_KEY") or None,
    )


def _words(text: str) -> frozenset[str]:
    return frozenset(text.replace(",", " ").split())


def _gpu_folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders of the mock GPUs that the process may see; none where it is not told of any."""
    folder = environ.get("BULLPEN_MOCK_GPU_DIR")
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if not folder or visible.strip() in {"", "-1"}:
        return ()
    indices = [index.strip() for index in visible.split(",")]
    if not all(index.isascii() and index.isdigit() for index in indices) or len(set(indices)) < len(indices):
        raise SettingsError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}: with mock GPUs (BULLPEN_MOCK_GPU_DIR), give different indices "
            "with commas between, like 0,1"
        )
    return tuple(Path(folder) / index for index in indices)


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise SettingsError(f"{name} is {text!r}: give a number that is not negative, like {default}")
    return number


def _whole(environ: Mapping[str, str], name: str, default: int, most: int | None = None) -> int:
    text = environ.get(name)
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19) or (most is not None and int(text) > most):
        limit = "or more" if most is None else f"to {most}"
        raise SettingsError(f"{name} is {text!r}: give a whole number from 0 {limit}")
    return int(text)
