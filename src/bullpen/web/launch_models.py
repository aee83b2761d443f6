"""Bodies and replies about launches and the host, with the examples that the API's document shows."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue
from pydantic.config import JsonDict

EXAMPLE_LAUNCH_ID = "5c1f0a5e-7d0b-4a36-9a8e-2b9c2c7d1e11"
EXAMPLE_LAUNCH_REQUEST: JsonDict = {
    "model": "facebook/opt-125m",
    "gpu_ids": [0],
    "task": "generate",
    "extra_kwargs": {"max_model_len": 256},
}
EXAMPLE_LAUNCH: JsonDict = {
    "launch_id": EXAMPLE_LAUNCH_ID,
    "model": "facebook/opt-125m",
    "gpu_ids": [0],
    "task": "generate",
    "state": "bootstrapping",
    "created_at": "2026-11-20T09:00:00.000000Z",
    "updated_at": "2026-11-20T09:00:00.250000Z",
    "error": None,
    "instance_id": EXAMPLE_LAUNCH_ID,
    "instance_state": "starting",
    "phase": "weights",
    "progress": 0.4,
    "remaining_seconds": 0.2,
    "pid": 46910,
    "url": "http://127.0.0.1:38211",
    "exit_code": None,
    "phases": {"start": 0.0, "configuration": 0.05, "weights": 0.2},
}
EXAMPLE_LOG: JsonDict = {
    "launch_id": EXAMPLE_LAUNCH_ID,
    "offset": 0,
    "next_offset": 43,
    "content": "INFO: Starting to load model on device 0...\n",
}
EXAMPLE_STATS: JsonDict = {
    "collected_at": "2026-11-20T09:00:00.000000Z",
    "load_avg_1m": 0.5,
    "load_avg_5m": 0.4,
    "load_avg_15m": 0.3,
    "cpu_count": 16,
    "memory_total_bytes": 137438953472,
    "memory_available_bytes": 120259084288,
    "memory_used_bytes": 17179869184,
    "memory_utilization_percent": 12.5,
    "host_memory_error": None,
    "gpu_count": 1,
    "gpus": [
        {
            "gpu_id": 0,
            "uuid": "GPU-0b5c5b2e-5d5b-4c4f-8f61-1f0a3a9d1c11",
            "name": "NVIDIA H200",
            "utilization_percent": 40.0,
            "memory_total_mib": 143771,
            "memory_used_mib": 129000,
            "memory_free_mib": 14771,
            "temperature_c": 41,
            "power_draw_watts": 310.5,
            "power_limit_watts": 700.0,
            "launch_ids": [EXAMPLE_LAUNCH_ID],
        }
    ],
    "nvidia_smi_error": None,
}
MOST_GPUS = 1024


class LaunchRequest(BaseModel):
    """What to launch. Fields that it does not know are ignored."""

    model_config = ConfigDict(
        extra="ignore", hide_input_in_errors=True, json_schema_extra={"examples": [EXAMPLE_LAUNCH_REQUEST]}
    )

    model: str = Field(min_length=1, description="a name on the Hugging Face hub, or a path on this host")
    gpu_ids: list[int] | None = Field(None, description="indices of GPUs, its own alone; left out: all of this host")
    task: Literal["generate", "embed"] = Field("generate", description="whether it writes text or embeds it")
    extra_kwargs: dict[str, JsonValue] = Field(
        {}, description="keywords of `vllm.LLM`; they become options of `vllm serve` and overrule Bullpen's"
    )
    gpu_count: int | None = Field(
        None, ge=1, le=MOST_GPUS, description="so many GPUs of Bullpen's choice, instead of `gpu_ids`"
    )
    gpu_share: float | None = Field(
        None, gt=0, le=1, description="the share of each GPU that it takes; left out: all of it"
    )


class Launch(BaseModel):
    """A launch as it is now."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_LAUNCH]})

    launch_id: str
    model: str = Field(description="as it was asked for")
    gpu_ids: list[int] = Field(description="indices of its GPUs; empty on a host without any")
    task: Literal["generate", "embed"]
    state: Literal["bootstrapping", "ready", "stopping", "stopped", "failed"] = Field(
        description="a launch that sleeps is `bootstrapping`, for it takes no work until it is woken"
    )
    created_at: AwareDatetime
    updated_at: AwareDatetime = Field(description="when something was last seen to change")
    error: str | None = Field(description="why it failed, and the way out")
    instance_id: str = Field(description="the id under which v2 has it: the same")
    instance_state: Literal["starting", "ready", "sleeping", "stopping", "stopped", "failed"] = Field(
        description="v2's own word"
    )
    phase: str | None = Field(description="while it is `bootstrapping`: what it is doing, or `sleeping`")
    progress: float | None = Field(description="of its start, 0 to 1")
    remaining_seconds: float | None = Field(description="how long its start should still take; null: unknown")
    pid: int | None = Field(description="of the server process, even after its end")
    url: str | None = Field(description="its own OpenAI server")
    exit_code: int | None = Field(description="of a server that has ended; a signal's is negative")
    phases: dict[str, float] = Field(description="when each phase of its start began, in seconds")


class LaunchLog(BaseModel):
    """A piece of a launch's log; offsets count bytes."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_LOG]})

    launch_id: str
    offset: int = Field(description="where the piece begins: as asked for, moved on to a whole character that is kept")
    next_offset: int = Field(description="what to ask for next")
    content: str = Field(description="1 MiB at most, no character of it cut")


class GpuStats(BaseModel):
    """One GPU now; null where its driver does not tell."""

    gpu_id: int
    uuid: str | None
    name: str
    utilization_percent: float | None
    memory_total_mib: int | None
    memory_used_mib: int | None
    memory_free_mib: int | None
    temperature_c: int | None
    power_draw_watts: float | None
    power_limit_watts: float | None
    launch_ids: list[str] = Field(description="who has it, awake or on the way there")


class Stats(BaseModel):
    """The host now. Memory is what this daemon's own limits leave of it."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_STATS]})

    collected_at: AwareDatetime
    load_avg_1m: float | None
    load_avg_5m: float | None
    load_avg_15m: float | None
    cpu_count: int | None
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    memory_used_bytes: int | None
    memory_utilization_percent: float | None
    host_memory_error: str | None
    gpu_count: int
    gpus: list[GpuStats]
    nvidia_smi_error: str | None = Field(description="why nothing can be said of GPUs")
