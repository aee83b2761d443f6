"""What the parts of a throughput measurement say to each other: the clients there are, a job, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

HOST = "127.0.0.1"
PROMPT = "In a bullpen the next pitcher is"
COMPLETE = "/vllm_bootstrap.InferenceService/Complete"
COMPLETIONS = "/v1/completions"


class Client(StrEnum):
    """By what callers call. The minimal ones are no client: they make a request once and send its bytes."""

    MINIMAL_GRPC = "minimal gRPC"
    MINIMAL_HTTP = "minimal HTTP"
    GRPC_AIO = "grpc.aio"
    AIOHTTP = "aiohttp"
    HTTPX = "httpx"

    @property
    def through(self) -> bool:
        """Whether they go by gRPC through the daemon, and not straight to the engine."""
        return self in (Client.MINIMAL_GRPC, Client.GRPC_AIO)


@dataclass(frozen=True)
class Job:
    """What callers do.

    Attributes:
        client: by what they call.
        port: of the server, on this host.
        name: of what they ask: the launch, or the model where they go straight to the engine.
        tokens: how many a completion has.
        callers: how many there are.
        seconds: for how long they call.
    """

    client: Client
    port: int
    name: str
    tokens: int
    callers: int
    seconds: float

    def body(self) -> dict[str, object]:
        """A request straight to the engine."""
        return {"model": self.name, "prompt": [PROMPT], "max_tokens": self.tokens}


@dataclass(frozen=True)
class Done:
    """What callers did.

    Attributes:
        warming: calls answered before the time.
        calls: calls answered in the time.
        seconds: the time.
        cpu_seconds: what their process computed in the time.
        tokens: how many a completion had.
    """

    warming: int
    calls: int
    seconds: float
    cpu_seconds: float
    tokens: int


class Tally:
    """Counts answers, and remembers when the last one came and how many tokens it had."""

    def __init__(self) -> None:
        self.calls = 0
        self.tokens = 0
        self.last = time.monotonic()

    def answered(self, tokens: int) -> None:
        """An answer is there."""
        self.calls += 1
        self.tokens = tokens
        self.last = time.monotonic()
