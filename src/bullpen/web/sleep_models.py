"""Bodies and replies about sleep, swap, GPUs and reasons, with the examples that the API's document shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic.config import JsonDict

from bullpen.web.models import EXAMPLE_CONFIG, EXAMPLE_INSTANCE, Activity, Instance, VllmConfig

LONGEST_DRAIN = 24 * 3600
ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
EXAMPLE_SWAP: JsonDict = {"in": "coder", "out": "auto", "drain": 10}
EXAMPLE_NEW_IN: JsonDict = {"in": {"instance_id": "coder", **EXAMPLE_CONFIG}, "out": ["chat"], "sleep_level": 1}
EXAMPLE_ASLEEP: JsonDict = {
    **EXAMPLE_INSTANCE,
    "instance_id": "chat",
    "state": "sleeping",
    "sleep_level": 1,
    "assigned_gpus": ["GPU-0b5c5b2e-5d5b-4c4f-8f61-1f0a3a9d1c11"],
    "reason": "goes to sleep (level 1): makes room for 'coder' (swap)",
}
EXAMPLE_SWAPPED: JsonDict = {
    "swap": 12,
    "in": {**EXAMPLE_INSTANCE, "instance_id": "coder"},
    "out": [EXAMPLE_ASLEEP],
    "seconds": 0.9,
    "stages": {"out": 0.0, "in": 0.41, "done": 0.9},
}
EXAMPLE_GPUS: JsonDict = {
    "gpus": [
        {
            "index": 0,
            "uuid": "GPU-0b5c5b2e-5d5b-4c4f-8f61-1f0a3a9d1c11",
            "name": "NVIDIA H200",
            "parent": None,
            "memory_mib": 143771,
            "free_mib": 12000,
            "awake": [{"instance_id": "coder", "share": None, "mib": 129000}],
            "coming": [],
            "asleep": [{"instance_id": "chat", "share": None, "mib": 1200}],
            "foreign": [{"pid": 4711, "name": "python3", "mib": 600}],
            "problem": None,
        }
    ],
    "host": {"asleep_mib": 31000, "budget_mib": 262144, "available_mib": 400000},
}
EXAMPLE_VERDICT: JsonDict = {"level": 1, "works": False, "why": "it answers otherwise than before the sleep"}
EXAMPLE_EXPLANATION: JsonDict = {
    "instance_id": "chat",
    "state": "sleeping",
    "summary": "It is sleeping at level 1. Last: fell asleep in 5.72 s (level 1): no request for 600 s.",
    "activity": None,
    "waits_for": None,
    "next_step": {"to": "level_2", "in_seconds": 2400.0, "why": "unless a request comes: 3600 s without one"},
    "works": {
        "level_1": {"works": True, "why": "woke and answered as before", "at": "2026-11-20T09:20:00.000+00:00"},
        "level_2": None,
    },
    "notes": [
        {"at": "2026-11-20T10:00:00.000+00:00", "text": "fell asleep in 5.72 s (level 1): no request for 600 s"},
    ],
}


class Strictly(BaseModel):
    """A request: a word that it does not know is refused, and nothing of it is quoted."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


Drain = Annotated[
    float | None,
    Field(
        ge=0,
        le=LONGEST_DRAIN,
        description="seconds that requests in flight may take to end; the daemon's setting where left out",
    ),
]
NewRequests = Annotated[
    Literal["hold", "refuse"],
    Field(description="requests that come meanwhile: held until it is awake again, or refused with 503"),
]


class SleepQuery(Strictly):
    """How to sleep."""

    level: int | None = Field(
        None, ge=1, le=2, description="1 keeps the weights in host memory, 2 discards them; the lightest that works"
    )
    drain: Drain = None
    new_requests: NewRequests = "hold"


class NewVerdict(Strictly):
    """What somebody found out about a level of sleep."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_VERDICT]})

    level: int = Field(strict=True, ge=1, le=2)
    works: bool = Field(strict=True, description="whether the model wakes from it and answers as before")
    why: str = Field(min_length=1, max_length=500, pattern=ONE_LINE, description="how that is known, in one line")


class NewInstance(VllmConfig):
    """What to run, and its id."""

    instance_id: str | None = Field(None, min_length=1, description="its id; Bullpen's choice where left out")


def kind_of_incoming(value: Any) -> str:
    """Whether text or a configuration was given."""
    return "id" if isinstance(value, str) else "configuration"


class SwapRequest(Strictly):
    """Who comes in, and who goes to sleep for it."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_SWAP, EXAMPLE_NEW_IN]})

    incoming: Annotated[
        Annotated[str, Tag("id")] | Annotated[NewInstance, Tag("configuration")], Discriminator(kind_of_incoming)
    ] = Field(alias="in", description="an id, or what to create")
    out: str | list[str] = Field(
        "auto", description="an id or several; `auto`: those that stand in its way, by priority and last use"
    )
    sleep_level: int | None = Field(None, strict=True, ge=1, le=2, description="as for a sleep")
    drain: Drain = None
    new_requests: NewRequests = "hold"

    @property
    def outgoing(self) -> list[str] | None:
        """The ids of what goes; None leaves the choice to Bullpen."""
        if isinstance(self.out, list):
            return self.out
        return None if self.out == "auto" else [self.out]


class Swapped(BaseModel):
    """A swap that is done."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_SWAPPED]})

    swap: int = Field(description="its number, as in the events of type SWAP")
    incoming: Instance = Field(alias="in")
    out: list[Instance] = Field(description="those that were awake and went to sleep for it")
    seconds: float
    stages: dict[str, float] = Field(description="when each stage began, in seconds")


class GpuClaim(BaseModel):
    """What an instance has of a GPU."""

    instance_id: str
    share: float | None = Field(description="null: it takes it alone")
    mib: int | None = Field(description="memory that it holds or needs there; null: unknown")


class ForeignProcess(BaseModel):
    """A process on a GPU that belongs to no instance."""

    pid: int
    name: str
    mib: int | None


class GpuState(BaseModel):
    """A GPU or a MIG device, and who has it."""

    index: int
    uuid: str
    name: str
    parent: str | None = Field(description="of a MIG device: the GPU that it is part of")
    memory_mib: int
    free_mib: int | None = Field(description="null: unknown")
    awake: list[GpuClaim]
    coming: list[GpuClaim]
    asleep: list[GpuClaim]
    foreign: list[ForeignProcess]
    problem: str | None = Field(description="why it cannot be read")


class HostMemory(BaseModel):
    """The host's memory, in MiB."""

    asleep_mib: int = Field(description="what sleepers keep")
    budget_mib: int | None = Field(description="what they may keep; null: no limit")
    available_mib: int | None = Field(description="null: unknown")


class GpuReport(BaseModel):
    """All GPUs, who has them, and the host's memory."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_GPUS]})

    gpus: list[GpuState]
    host: HostMemory


class NextStep(BaseModel):
    """The next step down the ladder, if nobody uses it."""

    to: Literal["level_1", "level_2", "emulated", "stopped"]
    in_seconds: float
    why: str


class Verdict(BaseModel):
    """Whether a level of sleep was seen to work for this model, engine and GPU."""

    works: bool
    why: str
    at: str | None


class Verdicts(BaseModel):
    """The same for each level; null: not tried yet."""

    level_1: Verdict | None
    level_2: Verdict | None


class Note(BaseModel):
    """Something that was decided, and why."""

    at: str
    text: str


class Explanation(BaseModel):
    """Why an instance is as it is, what it waits for, and what comes next."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_EXPLANATION]})

    instance_id: str
    state: str
    summary: str
    activity: Activity | None = Field(description="what is being done with it")
    waits_for: str | None
    next_step: NextStep | None
    works: Verdicts
    notes: list[Note] = Field(description="oldest first")
