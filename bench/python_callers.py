"""Callers by the clients that a Python program uses, each request made and each answer read as such a program does.

All callers share a channel or a session, with the options that it has by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc.aio
import httpx

from bench.load import COMPLETE, COMPLETIONS, HOST, PROMPT, Client, Job, Tally
from bullpen.proto import bootstrap as pb

TIMEOUT = 60.0

Ask = Callable[[], Awaitable[int]]
"""Makes one call; gives the tokens of its completion."""


async def call(job: Job, tally: Tally) -> None:
    """Call until cancelled. Raises whatever a client raises."""
    async with WAYS[job.client](job) as ask, asyncio.TaskGroup() as group:
        for _ in range(job.callers):
            group.create_task(repeat(ask, tally))


async def repeat(ask: Ask, tally: Tally) -> None:
    """One caller."""
    while True:
        tally.answered(await ask())


@asynccontextmanager
async def by_grpc(job: Job) -> AsyncIterator[Ask]:
    """All on one channel."""
    # A proxy that the environment names is not asked for this host, here and in httpx.
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(f"{HOST}:{job.port}", options=options) as channel:
        complete = channel.unary_unary(
            COMPLETE,
            request_serializer=pb.CompleteRequest.SerializeToString,
            response_deserializer=pb.CompleteResponse.FromString,
        )

        async def ask() -> int:
            request = pb.CompleteRequest(launch_id=job.name, prompts=[PROMPT], max_tokens=job.tokens)
            answer = await complete(request, timeout=TIMEOUT)
            return int(answer.completions[0].completion_tokens)

        yield ask


@asynccontextmanager
async def by_aiohttp(job: Job) -> AsyncIterator[Ask]:
    """All in one session, which has room for 100 connections and keeps them open."""
    # vLLM brings it; the other clients can do without.
    import aiohttp

    async with aiohttp.ClientSession(f"http://{HOST}:{job.port}") as session:

        async def ask() -> int:
            async with session.post(COMPLETIONS, json=job.body(), raise_for_status=True) as answer:
                return int((await answer.json())["usage"]["completion_tokens"])

        yield ask


@asynccontextmanager
async def by_httpx(job: Job) -> AsyncIterator[Ask]:
    """All in one session, which has room for 100 connections and keeps 20 open.

    It is several times slower where it is told to keep all of them: it looks through them for each request.
    """
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{job.port}", timeout=TIMEOUT, trust_env=False) as session:

        async def ask() -> int:
            answer = await session.post(COMPLETIONS, json=job.body())
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        yield ask


WAYS = {Client.GRPC_AIO: by_grpc, Client.AIOHTTP: by_aiohttp, Client.HTTPX: by_httpx}
