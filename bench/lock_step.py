"""Callers of gRPC in two designs, as a process of its own: all at the same time, and one request at a time.

``python -m bench.lock_step`` reads a `Job` as JSON from standard input and prints a list of `Round`. In the lock-step
design a caller waits for a lock before it calls, which is what a worker does that reads the next request when it has
answered the last.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass

import grpc.aio

from bench.load import COMPLETE
from bullpen.proto import bootstrap as pb

PROMPT = "Pitcher {number} in the bullpen is"


@dataclass(frozen=True)
class Job:
    """What to do: so many rounds of each design in turn, each caller calling so many times in a round."""

    target: str
    launch_id: str
    callers: int
    tokens: int
    calls: int
    rounds: int


@dataclass(frozen=True)
class Round:
    """Calls a second in both designs, and whether they had the same answers."""

    together: float
    lock_step: float
    same: bool


class Callers:
    """All of them, on one channel."""

    def __init__(self, channel: grpc.aio.Channel, job: Job) -> None:
        self._job = job
        self._complete = channel.unary_unary(
            COMPLETE,
            request_serializer=pb.CompleteRequest.SerializeToString,
            response_deserializer=pb.CompleteResponse.FromString,
        )

    async def rate(self, calls: int, turn: AbstractAsyncContextManager[object]) -> tuple[float, set[str]]:
        """Calls a second where each caller calls so many times, each call inside `turn`; and all answers."""
        texts = set()

        async def caller(number: int) -> None:
            prompt = PROMPT.format(number=number)
            request = pb.CompleteRequest(
                launch_id=self._job.launch_id, prompts=[prompt], max_tokens=self._job.tokens, temperature=0.0
            )
            for _ in range(calls):
                async with turn:
                    answer = await self._complete(request)
                texts.add(f"{number} {answer.completions[0].text}")

        begun = time.monotonic()
        await asyncio.gather(*map(caller, range(self._job.callers)))
        return self._job.callers * calls / (time.monotonic() - begun), texts


async def measure(job: Job) -> list[Round]:
    """Both designs in turn."""
    rounds = []
    async with grpc.aio.insecure_channel(job.target) as channel:
        callers = Callers(channel, job)
        await callers.rate(1, nullcontext())
        for _ in range(job.rounds):
            together, said = await callers.rate(job.calls, nullcontext())
            lock_step, repeated = await callers.rate(job.calls, asyncio.Lock())
            rounds.append(Round(together, lock_step, said == repeated))
    return rounds


def main() -> None:
    """Do what standard input says, and print what came of it."""
    job = Job(**json.load(sys.stdin))
    print(json.dumps([asdict(one) for one in asyncio.run(measure(job))]))


if __name__ == "__main__":
    main()
