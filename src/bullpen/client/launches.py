"""What the launches' side of a daemon answers, as typed values. Keys that a newer daemon adds are ignored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Base of all of them: a value that does not change."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LaunchState(StrEnum):
    """How far a launch is."""

    bootstrapping = "bootstrapping"
    ready = "ready"
    stopping = "stopping"
    stopped = "stopped"
    failed = "failed"

    @property
    def ended(self) -> bool:
        """Whether its server process is gone."""
        return self in (LaunchState.stopped, LaunchState.failed)


class LaunchRequest(BaseModel):
    """The body of a launch.

    Attributes:
        model: a name on the Hugging Face hub, or a path on the server.
        gpu_ids: indices of the GPUs; None: all.
        task: ``generate`` or ``embed``.
        extra_kwargs: arguments of ``vllm.LLM``.
    """

    model: str = Field(min_length=1)
    gpu_ids: list[int] | None = None
    task: str = Field("generate", pattern="^(embed|generate)$")
    extra_kwargs: dict[str, Any] = Field(default_factory=dict)


class LaunchResponse(Answer):
    """One launch.

    Attributes:
        gpu_ids: indices of the GPUs that it has.
        error: why it failed.
        instance_id: the same thing's id among the instances; None from a server that has none.
        phase: while it starts: what it is doing; `progress` is 0 to 1.
        remaining_seconds: while it starts: how long it should still take; None: unknown.
    """

    launch_id: str
    model: str
    gpu_ids: list[int]
    task: str
    state: LaunchState
    created_at: AwareDatetime
    updated_at: AwareDatetime
    error: str | None = None
    instance_id: str | None = None
    phase: str | None = None
    progress: float | None = None
    remaining_seconds: float | None = None


class LogsResponse(Answer):
    """A piece of a launch's log; ``offset`` and ``next_offset`` count bytes of its UTF-8 form."""

    launch_id: str
    offset: int
    next_offset: int
    content: str


class GPUStatsResponse(Answer):
    """One GPU as it is now; None where the driver does not tell."""

    gpu_id: int
    uuid: str | None = None
    name: str
    utilization_percent: float | None = None
    memory_total_mib: int | None = None
    memory_used_mib: int | None = None
    memory_free_mib: int | None = None
    temperature_c: int | None = None
    power_draw_watts: float | None = None
    power_limit_watts: float | None = None


class SystemStatsResponse(Answer):
    """The server's host as it is now; None where nobody could tell, and the two errors say why."""

    collected_at: AwareDatetime
    load_avg_1m: float | None = None
    load_avg_5m: float | None = None
    load_avg_15m: float | None = None
    cpu_count: int | None = None
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_utilization_percent: float | None = None
    host_memory_error: str | None = None
    gpu_count: int
    gpus: list[GPUStatsResponse]
    nvidia_smi_error: str | None = None


class TopLogprob(NamedTuple):
    """One of the likeliest tokens at a place; ``logprob`` is its natural logarithm."""

    token: str
    logprob: float


class TokenLogprob(NamedTuple):
    """How likely a token was.

    Attributes:
        logprob: the natural logarithm; None where the engine has none.
        top: the likeliest tokens at its place, as many as were asked for.
    """

    token: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


class Completion(NamedTuple):
    """A text that a model wrote.

    Attributes:
        finish_reason: why it ended: ``stop``, ``length``, …; empty where the service that was asked does not say.
        logprobs: of each token, where ``logprobs`` were asked for.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class ChatAnswer(NamedTuple):
    """What a model answered in a conversation.

    Attributes:
        text: the answer.
        reasoning: what a reasoning model thought before it; empty for others.
        finish_reason: why it ended: ``stop``, ``length``, …
        logprobs: of each token, where ``logprobs`` were asked for.
    """

    text: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Token(NamedTuple):
    """A piece of a text that is being written; often one token.

    Attributes:
        text: what is to be added to the text.
        reasoning: what is to be added to a reasoning model's thoughts.
        finish_reason: in the last piece why the text ended; else empty.
        prompt_tokens, completion_tokens: of the whole, in the last piece; else 0.
        logprobs: of its tokens, where ``logprobs`` were asked for.
    """

    text: str
    reasoning: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """One of several completions, told as soon as it is there.

    Attributes:
        index: its prompt's place, from 0.
        choice: which of the ``n`` completions of that prompt it is, from 0.
    """

    index: int
    completion: Completion
    choice: int = 0
