"""Callers that go away: their requests end in the engine, and nobody gets another's answer."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from bullpen.proto import bootstrap, v1
from tests.rpc.serving import DEADLINE_SECONDS, Rpc, completion, eventually, everything, refused, serving
from tests.sim.simulator import Simulator

LONG = 20_000
"""Tokens of a completion that takes 200 s."""


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.serving(tmp_path_factory.mktemp("slow"), tokens_per_second=100) as simulator:
        yield simulator


@pytest.fixture
async def rpc(slow: Simulator) -> AsyncIterator[Rpc]:
    async with serving() as served:
        served.book.add("gen", slow.port)
        yield served


def in_flight(simulator: Simulator) -> int:
    return int(simulator.http.get("/bullpen/gate").json()["in_flight"])


def calls(rpc: Rpc, **more: float) -> list[grpc.aio.Call]:
    """One call of every kind that generates, none of which ends soon."""
    as_it_is = json.dumps({"prompt": "x", "max_tokens": LONG}).encode()
    old = bootstrap.CompleteRequest(launch_id="gen", prompts=["x"], max_tokens=LONG)
    new = v1.CompleteRequest(instance_id="gen", prompts=["x", "y"], sampling=v1.Sampling(max_tokens=LONG))
    chat = v1.ChatRequest(
        instance_id="gen", messages=[v1.ChatMessage(role="user", content="x")], sampling=v1.Sampling(max_tokens=LONG)
    )
    return [
        rpc.complete(old, **more),
        rpc.complete_stream(old, **more),
        rpc.complete_v1(new, **more),
        rpc.stream_complete(new, **more),
        rpc.chat(chat, **more),
        rpc.stream_chat(chat, **more),
        rpc.relay(v1.RelayRequest(instance_id="gen", path="/v1/completions", body=as_it_is), **more),
    ]


async def test_cancelled_calls_end_in_the_engine(rpc: Rpc, slow: Simulator) -> None:
    started = calls(rpc)
    await eventually("all are computed", lambda: in_flight(slow) == len(started))
    for call in started:
        call.cancel()
    await eventually("none is", lambda: in_flight(slow) == 0)


async def test_deadlines_are_kept_and_end_in_the_engine(rpc: Rpc, slow: Simulator) -> None:
    started = calls(rpc, timeout=0.5)
    await eventually("all are computed", lambda: in_flight(slow) == len(started))
    for code, _ in await asyncio.gather(*map(refused, started)):
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually("none is", lambda: in_flight(slow) == 0)


async def test_a_channel_that_is_closed(rpc: Rpc, slow: Simulator) -> None:
    started = calls(rpc)
    await eventually("all are computed", lambda: in_flight(slow) == len(started))
    await rpc.channel.close()
    await eventually("none is", lambda: in_flight(slow) == 0)


CALLER = """
import sys, grpc
from bullpen.proto import bootstrap as pb
channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")
complete = channel.unary_unary("/vllm_bootstrap.InferenceService/Complete", pb.CompleteRequest.SerializeToString)
complete(pb.CompleteRequest(launch_id="gen", prompts=["x"], max_tokens=20000))
"""


async def test_a_caller_that_is_killed(rpc: Rpc, slow: Simulator) -> None:
    with subprocess.Popen([sys.executable, "-c", CALLER, str(rpc.server.port)], start_new_session=True) as caller:
        try:
            await eventually("it is computed", lambda: in_flight(slow) == 1)
        finally:
            caller.send_signal(signal.SIGKILL)
    await eventually("it is not", lambda: in_flight(slow) == 0)


async def test_a_slow_reader_gets_everything(simulator: Simulator) -> None:
    async with serving() as rpc:
        rpc.book.add("gen", simulator.port)
        prompts = [f"prompt {number}" for number in range(100)]
        request = v1.CompleteRequest(instance_id="gen", prompts=prompts, sampling=v1.Sampling(max_tokens=50))
        found = [""] * len(prompts)
        pause = 0
        async for delta in rpc.stream_complete(request):
            found[delta.index] += delta.text
            pause += 1
            if pause % 500 == 0:
                await asyncio.sleep(0.02)
        assert found == [completion(prompt, 50) for prompt in prompts]


@pytest.mark.parametrize("seed", [1, 2])
async def test_nobody_gets_another_s_answer(simulator: Simulator, seed: int) -> None:
    """500 requests, each with prompts of its own, of which a third are given up at some moment."""
    chance = random.Random(seed)
    open_calls = asyncio.Semaphore(64)
    answered = 0

    async def one(rpc: Rpc, number: int) -> None:
        nonlocal answered
        prompts = [f"seed {seed} request {number} prompt {index}" for index in range(chance.choice([1, 1, 1, 4]))]
        tokens = chance.randint(1, 60)
        expected = [completion(prompt, tokens) for prompt in prompts]
        old = bootstrap.CompleteRequest(launch_id="gen", prompts=prompts, max_tokens=tokens)
        new = v1.CompleteRequest(instance_id="gen", prompts=prompts, sampling=v1.Sampling(max_tokens=tokens))
        method, request = chance.choice([(rpc.complete, old), (rpc.complete_stream, old), (rpc.stream_complete, new)])
        gives_up = chance.random() < 0.33
        patience = chance.uniform(0.0, 0.02)
        async with open_calls:
            call = method(request)
            if gives_up:
                asyncio.get_running_loop().call_later(patience, call.cancel)
            with suppress(asyncio.CancelledError):
                if method is rpc.stream_complete:
                    found = [""] * len(prompts)
                    async for delta in call:
                        found[delta.index] += delta.text
                        # Who leaves in the middle has had nothing but the beginning of what was asked for.
                        assert expected[delta.index].startswith(found[delta.index])
                elif method is rpc.complete_stream:
                    found = [item.text for item in await everything(call)]
                else:
                    found = [item.text for item in (await call).completions]
                assert found == expected
                answered += 1

    async with serving() as rpc:
        rpc.book.add("gen", simulator.port)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*(one(rpc, number) for number in range(500)))
    assert 500 * 0.6 < answered < 500
    await eventually("none is computed", lambda: in_flight(simulator) == 0)


async def test_stopping_lets_calls_end_and_then_ends_them(slow: Simulator, tmp_path: Path) -> None:
    async with serving() as rpc:
        rpc.book.add("gen", slow.port)
        short = rpc.complete(bootstrap.CompleteRequest(launch_id="gen", prompts=["x"], max_tokens=30))
        long = rpc.complete(bootstrap.CompleteRequest(launch_id="gen", prompts=["x"], max_tokens=LONG))
        ends = asyncio.gather(asyncio.ensure_future(_answer(short)), asyncio.ensure_future(_answer(long)))
        await eventually("both are computed", lambda: in_flight(slow) == 2)
        await rpc.server.stop(grace=1.0)
        (text, end) = await ends
        assert text == completion("x", 30)
        assert end in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await eventually("none is computed", lambda: in_flight(slow) == 0)


async def _answer(call: grpc.aio.UnaryUnaryCall) -> str | grpc.StatusCode:
    try:
        return str((await call).completions[0].text)
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
