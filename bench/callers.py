"""Callers that ask a server for completions, each again as soon as it is answered, as a process of their own.

``python -m bench.callers`` reads a `Job` as JSON from standard input and prints what came of it, a `Done`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict

import uvloop

from bench import minimal_callers, python_callers
from bench.load import Client, Done, Job, Tally

WARM_SECONDS = 0.3
"""What callers do in this time, and before each could have had an answer, is not counted."""
MINIMAL = (Client.MINIMAL_GRPC, Client.MINIMAL_HTTP)


async def run(job: Job) -> Done:
    """Let the callers call. Raises whatever ends them before their time."""
    tally = Tally()
    calling = asyncio.create_task(call(job, tally))
    try:
        await wait(calling, WARM_SECONDS)
        while tally.calls < job.callers:
            await wait(calling, 0.05)
        # Answers come in waves where all callers wait for the engine: the time goes from answer to answer, so that
        # the gaps between waves count alike wherever it begins.
        warming, begun, cpu = tally.calls, tally.last, time.process_time()
        await wait(calling, job.seconds)
        calls, seconds, computed = tally.calls - warming, tally.last - begun, time.process_time() - cpu
    finally:
        calling.cancel()
        await asyncio.wait([calling])
    if not calls:
        raise RuntimeError(f"no answer in {job.seconds:g} s")
    return Done(warming, calls, seconds, computed, tally.tokens)


def call(job: Job, tally: Tally) -> Coroutine[None, None, None]:
    """The callers of a job, which call until they are cancelled."""
    return minimal_callers.call(job, tally) if job.client in MINIMAL else python_callers.call(job, tally)


async def wait(calling: asyncio.Task[None], seconds: float) -> None:
    """Let them call for so long."""
    ended, _ = await asyncio.wait([calling], timeout=seconds)
    for task in ended:
        task.result()


def main() -> None:
    """Do what standard input says, and print what came of it."""
    given = json.load(sys.stdin)
    job = Job(**{**given, "client": Client(given["client"])})
    # A Python program runs asyncio's own loop where it does not choose another.
    loop = uvloop.new_event_loop if job.client in MINIMAL else None
    with asyncio.Runner(loop_factory=loop) as runner:
        print(json.dumps(asdict(runner.run(run(job)))))


if __name__ == "__main__":
    main()
