"""Bodies and replies of the REST API, with the examples that its document shows."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
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
}
EXAMPLE_INSTANCE: JsonDict = {
    "status": "running",
    "instance_id": EXAMPLE_ID,
    "revision": 7,
    **EXAMPLE_CONFIG,
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


class VllmConfig(V1Config):
    """What to run: vLLM's command line, its environment, its GPUs."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_CONFIG]})

    gpu_uuids: list[str] | None = Field(
        None, description="GPUs that the instance claims, by UUID; none given: none claimed"
    )
    annotations: dict[str, str] | None = Field(None, description="opaque to Bullpen, returned as given")
    engine: Literal["vllm", "sim"] | None = Field(
        None, description="engine to run it; the daemon's default where left out"
    )


class InstanceError(BaseModel):
    """Why an instance ended."""

    kind: str = Field(alias="class", description="a stable word, such as `out_of_memory`")
    message: str = Field(description="one sentence: what happened, and the way out")


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
