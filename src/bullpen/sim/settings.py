"""What the simulator does, set by its environment: delays, failures and sizes (`BULLPEN_SIM_*`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

FAILURES = ("start", "health", "sleep", "wake", "request")


class SettingsError(ValueError):
    """A variable of the environment has a value that cannot be used; the message names it and says what fits."""


@dataclass(frozen=True)
class Settings:
    """The delays, failures and sizes of one simulator.

    Times are in seconds, memory in MiB. `fail` is one of `FAILURES` or None. `exit_after` counts from the start of the
    process and is None where the process does not end by itself. `stubborn` is 0, 1 (the engine child ignores SIGTERM
    and outlives its parent) or 2 (the server process ignores SIGTERM too). `development_mode` and `api_key` are
    vLLM's own variables `VLLM_SERVER_DEV_MODE` and `VLLM_API_KEY`.
    """

    start_seconds: float
    sleep_seconds: float
    wake_seconds: float
    awake_mib: int
    asleep_mib: int
    tokens_per_second: float
    fail: str | None
    exit_after: float | None
    exit_code: int
    stubborn: int
    log_bytes: int
    development_mode: bool
    api_key: str | None


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from an environment; a variable that is unset or empty has its default.

    Raises SettingsError.
    """
    tokens_per_second = _number(environ, "BULLPEN_SIM_TOKENS_PER_SECOND", 1000.0)
    if tokens_per_second == 0:
        raise SettingsError("BULLPEN_SIM_TOKENS_PER_SECOND is 0, so that no request would ever end: give more than 0")
    fail = environ.get("BULLPEN_SIM_FAIL") or None
    if fail is not None and fail not in FAILURES:
        raise SettingsError(f"BULLPEN_SIM_FAIL is {fail!r}: give one of {', '.join(FAILURES)}, or leave it unset")
    return Settings(
        start_seconds=_number(environ, "BULLPEN_SIM_START_SECONDS", 0.05),
        sleep_seconds=_number(environ, "BULLPEN_SIM_SLEEP_SECONDS", 0.02),
        wake_seconds=_number(environ, "BULLPEN_SIM_WAKE_SECONDS", 0.02),
        awake_mib=_whole(environ, "BULLPEN_SIM_AWAKE_MIB", 1024),
        asleep_mib=_whole(environ, "BULLPEN_SIM_ASLEEP_MIB", 64),
        tokens_per_second=tokens_per_second,
        fail=fail,
        exit_after=_number(environ, "BULLPEN_SIM_EXIT_AFTER", 0.0) if environ.get("BULLPEN_SIM_EXIT_AFTER") else None,
        exit_code=_whole(environ, "BULLPEN_SIM_EXIT_CODE", 1, most=255),
        stubborn=_whole(environ, "BULLPEN_SIM_STUBBORN", 0, most=2),
        log_bytes=_whole(environ, "BULLPEN_SIM_LOG_BYTES", 0),
        development_mode=_whole(environ, "VLLM_SERVER_DEV_MODE", 0) != 0,
        api_key=environ.get("VLLM_API_KEY") or None,
    )


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
