"""Bodies and replies of the REST API, with the examples that its document shows."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, field_validator
from pydantic.config import JsonDict

EXAMPLE_ID = "a1b2c3d4-e5f6-7890-abcd-ef1234567890"
EXAMPLE_V1_CONFIG: JsonDict = {
    "options": "--model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --port 8005",
    "env_vars": {"VLLM_USE_V1": "1", "VLLM_LOGGING_LEVEL": "DEBUG"},
}
EXAMPLE_CONFIG: JsonDict = {
    "options": "--model facebook/opt-125m --port 8000",
    "env_vars": {"VLLM_LOGGING_LEVEL": "DEBUG"},
    "annotations": {"team": "search"},
    "sleep_after": "10m",
}
EXAMPLE_INSTANCE: JsonDict = {
    "status": "running",
    "instance_id": EXAMPLE_ID,
    "revision": 7,
    **EXAMPLE_CONFIG,
    "sleep_after": 600.0,
    "engine": "vllm",
    "state": "ready",
    "model": "facebook/opt-125m",
    "served_model_names": ["facebook/opt-125m"],
    "url": "http://127.0.0.1:8000",
    "pid": 46910,
    "start": "spare",
    "created_at": "2026-11-20T09:00:00.000+00:00",
    "ready_at": "2026-11-20T09:00:00.412+00:00",
    "waited_seconds": 0.014,
    "phases": {"start": 0.0, "configuration": 0.05, "weights": 0.2, "bind": 0.35, "ready": 0.41},
    "can_sleep": True,
    "last_used_at": "2026-11-20T09:00:00.412+00:00",
}


class V1Config(BaseModel):
    """What to run, as the one-instance API has it."""

    model_config = ConfigDict(
        extra="forbid", hide_input_in_errors=True, json_schema_extra={"examples": [EXAMPLE_V1_CONFIG]}
    )

    options: str = Field(description="`vllm serve`'s command line, split as a POSIX shell splits words")
    env_vars: dict[str, str | bool | int | float] | None = Field(
        None, description="environment of the server; numbers and booleans are taken as their JSON text"
    )


class WarmUp(BaseModel):
    """A request that is sent to each new server once, so that no user pays for what the first one brings about."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    path: str = Field("/v1/completions", description="a path on the server")
    body: dict[str, JsonValue] = Field({}, description="the body of the POST")

    @field_validator("body")
    @classmethod
    def _is_sendable(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            raise ValueError("it holds text that is no valid Unicode, or a number that JSON does not have") from None
        return body


Seconds = Annotated[float, Strict()] | str


class VllmConfig(V1Config):
    """What to run: vLLM's command line, its environment, its GPUs, and when it sleeps."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_CONFIG]})

    gpu_uuids: list[str] | None = Field(
        None, description="GPUs that the instance claims, by UUID, a beginning of one, or index; none given: none named"
    )
    gpus: int | None = Field(None, strict=True, ge=1, le=1024, description="claim so many GPUs of Bullpen's choice")
    gpu_share: float | None = Field(
        None, strict=True, gt=0, le=1, description="the share of each GPU that it takes; none given: all of it"
    )
    sleep: Literal["engine", "emulate", "off"] | None = Field(
        None, description="the engine's own sleep, a stop that keeps the slot, or none; left out: by what it claims"
    )
    sleep_after: Seconds | None = Field(
        None, description="seconds without a request, or text such as `5m`, until it sleeps by itself"
    )
    discard_after: Seconds | None = Field(None, description="the same until it gives its weights up too (level 2)")
    stop_after: Seconds | None = Field(None, description="the same until its process ends; a wake starts it again")
    pin: bool | None = Field(None, strict=True, description="never step down by itself, nor for others")
    priority: int | None = Field(
        None, strict=True, ge=-(10**9), le=10**9, description="the higher, the later it must step down for others"
    )
    warm_up: WarmUp | None = Field(None, description="a request to be sent after each start, before it is `ready`")
    annotations: dict[str, str] | None = Field(None, description="opaque to Bullpen, returned as given")
    engine: Literal["vllm", "sim"] | None = Field(
        None, description="engine to run it; the daemon's default where left out"
    )


class InstanceError(BaseModel):
    """Why an instance ended."""

    kind: str = Field(alias="class", description="a stable word, such as `out_of_memory`")
    message: str = Field(description="one sentence: what happened, and the way out")


class Activity(BaseModel):
    """What is being done with an instance."""

    doing: Literal["start", "sleep", "wake", "inspect"]
    stage: str
    since: str
    reason: str = Field(description="why")
    waits_for: str | None = Field(description="what keeps it waiting, in words")


class Held(BaseModel):
    """Memory that an instance was measured to hold, in MiB; null where nobody could tell."""

    gpu_mib: int | None = Field(description="of each of its GPUs")
    host_mib: int | None = Field(description="of the host")


class Memory(BaseModel):
    """What an instance was measured to hold, by how deep it slept."""

    awake: Held | None = None
    level_1: Held | None = None
    level_2: Held | None = None


class Instance(BaseModel):
    """An instance. `status` has the wire's coarse words, `state` Bullpen's own."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_INSTANCE]})

    status: Literal["started", "running", "stopped", "terminated", "not_running"]
    instance_id: str
    revision: int
    options: str
    env_vars: dict[str, str] | None = None
    gpu_uuids: list[str] | None = None
    annotations: dict[str, str] | None = None
    gpus: int | None = None
    gpu_share: float | None = None
    sleep: Literal["engine", "emulate", "off"] | None = None
    sleep_after: float | None = Field(None, description="in seconds, however it was given")
    discard_after: float | None = None
    stop_after: float | None = None
    pin: bool | None = None
    priority: int | None = None
    warm_up: WarmUp | None = None
    engine: str
    state: Literal["starting", "ready", "sleeping", "stopping", "stopped", "failed"]
    model: str | None = None
    served_model_names: list[str] = []
    url: str | None = Field(None, description="where the instance answers")
    pid: int | None = None
    start: Literal["spare", "fork", "spawn"] | None = Field(
        None, description="how its process was made: a spare forked ahead, a fork, or a fresh interpreter"
    )
    created_at: str
    ready_at: str | None = None
    waited_seconds: float | None = Field(
        None, description="from the request to the start of its process: long where the engine was still being imported"
    )
    phases: dict[str, float] = Field({}, description="when each phase of the start began, in seconds")
    phase: str | None = Field(None, description="while it starts: what it is doing")
    progress: float | None = Field(None, ge=0, le=1, description="while it starts: how far it is")
    remaining_seconds: float | None = Field(
        None, description="while it starts: how long it should still take, going by earlier starts; null: unknown"
    )
    assigned_gpus: list[str] | None = Field(None, description="UUIDs of the GPUs that are its own, awake or asleep")
    can_sleep: bool = Field(description="whether it can be put to sleep when it is ready")
    sleep_level: Literal[1, 2] | None = Field(None, description="while its engine sleeps: how deep")
    sleep_emulated: bool | None = Field(None, description="true while it sleeps by having no process")
    activity: Activity | None = Field(None, description="what is being done with it")
    memory: Memory | None = None
    free_before_mib: dict[str, int] | None = Field(
        None, description="what its GPUs had free just before its last start or wake, in MiB by UUID"
    )
    last_used_at: str | None = None
    reason: str | None = Field(None, description="what was decided about it last, and why; `explain` has more")
    ended_at: str | None = None
    exit_code: int | None = Field(None, description="of an ended server; a signal's is negative")
    error: InstanceError | None = None


class InstanceList(BaseModel):
    """All instances, with details."""

    revision: int
    total_instances: int
    running_instances: int
    instances: list[Instance]


class InstanceIds(BaseModel):
    """All instances, by id alone."""

    revision: int
    instance_ids: list[str]
    count: int


class AllStopped(BaseModel):
    """What deleting all instances did."""

    status: Literal["all_stopped"] = "all_stopped"
    stopped_instances: list[Instance]
    total_stopped: int


class V1Status(BaseModel):
    """The one instance of v1."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "started", "pid": 46910}]})

    status: Literal["started", "stopped", "terminated"]
    pid: int


class Health(BaseModel):
    """The daemon lives."""

    status: Literal["OK"] = "OK"


class Readiness(BaseModel):
    """Whether the daemon can launch. Callers without a key learn nothing else."""

    model_config = ConfigDict(extra="allow")

    ready: bool


class Detail(BaseModel):
    """An error, in one sentence."""

    detail: str


class Problem(BaseModel):
    """One thing that is wrong with a request."""

    type: str
    loc: list[str | int]
    msg: str


class Problems(BaseModel):
    """What is wrong with a request; never the request itself."""

    detail: list[Problem]
