"""The daemon's settings: one model, filled from the command line, the environment, a YAML file and defaults."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bullpen.core.roster import Limits, Patience
from bullpen.errors import StateError
from bullpen.node.characters import LEAST_PIECE, check_text
from bullpen.node.logs import MAX_CHUNK
from bullpen.paths import default_state_dir

PREFIX = "BULLPEN_"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT]i?B?)?", re.IGNORECASE)
UNITS = {"m": 1, "g": 1024, "t": 1024 * 1024}
KEYS = frozenset({"access_key", "access_key_file"})


class Settings(BaseModel):
    """What ``bullpen serve`` can be told. Each field is also a flag, a variable ``BULLPEN_…`` and a key of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("0.0.0.0", description="address of REST API and gRPC")
    port: int = Field(8001, ge=0, le=65535, description="port of the REST API; 0 picks one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="port of gRPC; 0 turns it off; None: the one after `port`"
    )
    grpc_tls_cert: Path | None = Field(None, description="PEM file of gRPC's certificate chain; None for no TLS")
    grpc_tls_key: Path | None = Field(None, description="PEM file of its key")
    grpc_limit_message_size: bool = Field(False, description="refuse gRPC messages of more than 4 MiB")
    state_dir: Path = Field(default_factory=default_state_dir, description="journal, logs, sockets, key")
    engine: Literal["vllm", "sim"] | None = Field(None, description="engine of instances that name none")
    engine_python: str = Field(sys.executable, description="interpreter that the engine runs in")
    access_key: str | None = Field(None, repr=False, description="the admin key")
    access_key_file: Path | None = Field(None, description="file that holds the admin key")
    instance_host: str = Field("127.0.0.1", description="where servers listen whose options name no --host")
    allow_unauthenticated: bool = Field(False, description="answer remote callers although no key is set")
    mock_gpus: bool = Field(False, description="pretend to have GPUs named GPU-0 …")
    mock_gpu_count: int = Field(8, ge=0, le=1024, description="how many")
    mock_gpu_memory: int = Field(81920, ge=1, description="MiB that each of them has")
    allow_env: tuple[str, ...] = Field((), description="loader variables that instances may set all the same")
    stop_timeout: float = Field(10.0, ge=0, description="seconds from SIGTERM to SIGKILL for an instance")
    start_timeout: float = Field(1800.0, gt=0, description="seconds that a start may go without progress")
    sleep_timeout: float = Field(120.0, gt=0, description="seconds for each step of putting an instance to sleep")
    wake_timeout: float = Field(300.0, gt=0, description="seconds for each step of waking one")
    memory_timeout: float = Field(30.0, ge=0, description="seconds until memory on a GPU must be free")
    turn_timeout: float = Field(3600.0, gt=0, description="seconds that an instance waits for its turn on a GPU")
    drain: float = Field(60.0, ge=0, description="seconds for requests in flight before a sleep cuts them off")
    host_memory_budget: int | None = Field(
        None, ge=0, description="host memory that sleepers may keep together: MiB, or text such as 64GiB"
    )
    on_exit: Literal["stop", "keep"] = Field("stop", description="what SIGTERM to the daemon does to instances")
    spares: int = Field(1, ge=0, le=64, description="processes forked ahead")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field("info", description="of the daemon")
    log_cap: int = Field(256 * 1024 * 1024, ge=0, description="bytes kept of each instance's log; 0 keeps all")
    log_dir: Path | None = Field(None, description="where new instances' logs go; None: `logs` in the state directory")
    log_chunk: int = Field(
        MAX_CHUNK, ge=LEAST_PIECE, le=MAX_CHUNK, description="bytes of a launch's log that a reply has at most"
    )

    @field_validator("allow_env", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """One text holds several names, separated by commas."""
        return tuple(map(str.strip, value.split(","))) if isinstance(value, str) else value

    @field_validator("host_memory_budget", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        """A number is MiB; text may have a unit."""
        if not isinstance(value, str):
            return value
        match = SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError("give a number of MiB, or text such as 512MiB, 64GiB or 1TiB")
        return int(float(match[1]) * UNITS[(match[2] or "m").lower()[0]])

    @field_validator("host", "instance_host", "access_key")
    @classmethod
    def _refuse_other_bytes(cls, value: str | None) -> str | None:
        """Bytes of the environment that are no UTF-8 would be in no message and in no file."""
        return None if value is None else check_text(value)

    @field_validator("access_key")
    @classmethod
    def _trim(cls, value: str | None) -> str | None:
        """Callers' keys are trimmed too. A blank one is none."""
        return value.strip() or None if value is not None else None

    @field_validator("state_dir", "log_dir", "access_key_file", "grpc_tls_cert", "grpc_tls_key")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    def limits(self) -> Limits:
        """What instances are allowed, as the fleet knows it."""
        patience = Patience(
            start=self.start_timeout,
            sleep=self.sleep_timeout,
            wake=self.wake_timeout,
            memory=self.memory_timeout,
            turn=self.turn_timeout,
            drain=self.drain,
        )
        return Limits(self.instance_host, self.host_memory_budget, patience)


def load(given: Mapping[str, Any], config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Put the settings together: ``given`` (the command line) over the environment over the file over defaults.

    Raises:
        StateError: a source cannot be read, or holds a wrong value; the text names source and key.
    """
    if config is None and environ.get(PREFIX + "CONFIG"):
        config = Path(environ[PREFIX + "CONFIG"])
    layers = [("on the command line", dict(given)), ("in the environment", from_environment(environ))]
    if config is not None:
        layers.append((f"in {config}", read_file(config)))
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, layer in layers:
        # The two ways to give the key are one setting: the upper layer's counts, whichever it is.
        settled = merged.keys() | (KEYS if KEYS & merged.keys() else set())
        for key, value in layer.items():
            if value is not None and key not in settled:
                merged[key], origin[key] = value, place
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as problem:
        error = problem.errors(include_input=False)[0]
        key = str(error["loc"][0]) if error["loc"] else "?"
        place = origin.get(key, "in the settings")
        raise StateError(f"{spelled(key, place)} {place}: {error['msg']}") from None
    return with_key(settings)


def spelled(key: str, place: str) -> str:
    """A setting's name as it is written there."""
    if place == "in the environment":
        return PREFIX + key.upper()
    flag = key.replace("_", "-")
    return f"--{flag}" if place == "on the command line" else flag


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that the environment holds; lists are separated by commas."""
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        text = environ.get(PREFIX + name.upper())
        if text:
            values[name] = text
    if "access_key" not in values and environ.get("VLLM_ACCESS_KEY"):
        values["access_key"] = environ["VLLM_ACCESS_KEY"]
    return values


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; keys are spelt as the flags are, with ``-`` or ``_``.

    Raises:
        StateError: it cannot be read, or is no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise StateError(f"the configuration {path} cannot be read: {problem}") from problem
    if not isinstance(content, dict):
        raise StateError(f"the configuration {path} must hold `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    unknown = sorted(set(values) - set(Settings.model_fields))
    if unknown:
        raise StateError(f"the configuration {path} has unknown keys: {', '.join(unknown)}")
    return values


def with_key(settings: Settings) -> Settings:
    """Read the key from its file where one is named."""
    if settings.access_key_file is None:
        return settings
    try:
        key = settings.access_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise StateError(f"the access key file {settings.access_key_file} cannot be read: {problem}") from problem
    if not key:
        raise StateError(f"the access key file {settings.access_key_file} is empty")
    return settings.model_copy(update={"access_key": key})
