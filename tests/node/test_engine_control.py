"""Calls to a running server: against the simulator in a process of its own, and against a server that says anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bullpen.core.instance import Address, Config, Instance, Served
from bullpen.engines.sleeping import same_answer
from bullpen.node.engine_control import Activity, EngineCallError, EngineControl
from tests.sim.simulator import Simulator

CONTROL = EngineControl()
SECONDS = 20.0


def instance(port: int | None, *argv: str, pooling: bool = False, name: str = "test/model") -> Instance:
    made = Instance("x", "x", Config("", argv, engine="sim"), created_at=0.0)
    made.address = Address("127.0.0.1", port)
    made.served = Served(name, (name,), port, None, None, False, pooling=pooling)
    return made


async def is_busy(target: Instance) -> Activity:
    """Wait until something is in flight or held."""
    async with asyncio.timeout(SECONDS):
        while not (now := await CONTROL.activity(target)).in_flight + now.held:
            await asyncio.sleep(0.002)
    return now


# -- the simulator ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    folder = tmp_path_factory.mktemp("control")
    with Simulator.serving(
        folder, "--enable-sleep-mode", "--api-key", "sesame", sleep_seconds=0, wake_seconds=0, tokens_per_second=1000
    ) as running:
        yield running


@pytest.fixture
async def sim(simulator: Simulator) -> AsyncIterator[Instance]:
    target = instance(simulator.port, "--api-key", "sesame")
    yield target
    if await CONTROL.is_sleeping(target):
        await CONTROL.wake(target, 1, SECONDS)
    await CONTROL.set_gate(target, "open")


async def complete(target: Instance, tokens: int) -> None:
    """A request of a caller's, over the gate."""
    assert target.address is not None
    body = json.dumps({"prompt": "x", "max_tokens": tokens}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", target.address.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
    try:
        said = await asyncio.wait_for(reader.read(), SECONDS)
    finally:
        writer.close()
    status = int(said.split()[1])
    if status != 200:
        raise RuntimeError(f"{status}")


@pytest.mark.parametrize("level", [1, 2])
async def test_asleep_and_awake_again(sim: Instance, level: int) -> None:
    before = await CONTROL.canary(sim, SECONDS)
    await CONTROL.sleep(sim, level, SECONDS)
    assert await CONTROL.is_sleeping(sim)
    await CONTROL.wake(sim, level, SECONDS)
    assert not await CONTROL.is_sleeping(sim)
    assert same_answer(before, await CONTROL.canary(sim, SECONDS))


async def test_from_level_1_to_level_2(sim: Instance, simulator: Simulator) -> None:
    await CONTROL.sleep(sim, 1, SECONDS)
    await CONTROL.sleep(sim, 2, SECONDS, deepen=True)
    assert await CONTROL.is_sleeping(sim)
    assert simulator.metric("vllm:engine_sleep_state", sleep_state="discard_all") == 1
    await CONTROL.wake(sim, 2, SECONDS)


async def test_drain_waits_for_what_is_in_flight(sim: Instance) -> None:
    request = asyncio.create_task(complete(sim, 100))
    await is_busy(sim)
    assert (await CONTROL.drain(sim, SECONDS, "hold")).in_flight == 0
    await asyncio.wait_for(request, SECONDS)
    activity = await CONTROL.activity(sim)
    assert (activity.mode, activity.in_flight) == ("hold", 0)


async def test_drain_says_what_is_left_at_its_deadline(sim: Instance) -> None:
    request = asyncio.create_task(complete(sim, 2000))
    await is_busy(sim)
    assert (await CONTROL.drain(sim, 0.02, "refuse")).in_flight == 1
    with pytest.raises(RuntimeError, match="503"):
        await complete(sim, 1)
    assert not request.done()
    request.cancel()


async def test_drain_without_time_looks_once(sim: Instance) -> None:
    assert (await CONTROL.drain(sim, 0, "hold")).in_flight == 0


async def test_own_requests_pass_a_closed_gate_and_do_not_count(sim: Instance) -> None:
    await CONTROL.set_gate(sim, "hold")
    idle = (await CONTROL.activity(sim)).idle_seconds
    await CONTROL.canary(sim, SECONDS)
    await CONTROL.warm_up(sim, "/v1/completions", '{"prompt": "x", "max_tokens": 2}', SECONDS)
    after = await CONTROL.activity(sim)
    assert (after.in_flight, after.held) == (0, 0)
    assert after.idle_seconds >= idle


async def test_a_held_request_goes_on_when_the_gate_opens(sim: Instance) -> None:
    await CONTROL.set_gate(sim, "hold")
    request = asyncio.create_task(complete(sim, 1))
    assert (await is_busy(sim)).held == 1
    await CONTROL.set_gate(sim, "open")
    await asyncio.wait_for(request, SECONDS)


async def test_a_model_that_embeds(sim: Instance) -> None:
    assert sim.address is not None
    embedding = instance(sim.address.port, "--api-key", "sesame", pooling=True)
    first = await CONTROL.canary(embedding, SECONDS)
    assert first.startswith("embedding: ")
    assert same_answer(first, await CONTROL.canary(embedding, SECONDS))


async def test_without_the_key(sim: Instance) -> None:
    assert sim.address is not None
    with pytest.raises(EngineCallError, match=r"^POST /v1/completions was answered with 401: Unauthorized$"):
        await CONTROL.canary(instance(sim.address.port), SECONDS)


@pytest.mark.parametrize("failing", ["sleep", "wake"])
async def test_an_engine_that_fails(tmp_path: Path, failing: str) -> None:
    with Simulator.serving(tmp_path, "--enable-sleep-mode", fail=failing, sleep_seconds=0, wake_seconds=0) as running:
        target = instance(running.port)
        if failing == "wake":
            await CONTROL.sleep(target, 1, SECONDS)
        with pytest.raises(EngineCallError, match=f"^POST /{failing}.* was answered with 500: "):
            await (CONTROL.wake if failing == "wake" else CONTROL.sleep)(target, 1, SECONDS)


# -- a server that says anything -------------------------------------------------------------------------------

Replies = dict[str, tuple[int, bytes]]


@asynccontextmanager
async def scripted(replies: Replies, seen: list[str] | None = None) -> AsyncIterator[Instance]:
    """A server with set replies by path (without its query); a path without one is never answered."""

    hanging: list[asyncio.Event] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        target = head.split()[1].decode()
        if seen is not None:
            seen.append(target)
        reply = replies.get(target.partition("?")[0])
        if reply is None:
            hanging.append(asyncio.Event())
            await reader.read()
            hanging[-1].set()
        else:
            status, body = reply
            writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield instance(server.sockets[0].getsockname()[1])
        for left in hanging:
            await asyncio.wait_for(left.wait(), SECONDS)
    finally:
        server.close()


ASLEEP, AWAKE = (200, b'{"is_sleeping": true}'), (200, b'{"is_sleeping": false}')
DONE = (200, b"")


async def test_a_sleep_that_had_no_effect() -> None:
    async with scripted({"/sleep": DONE, "/is_sleeping": AWAKE}) as target:
        with pytest.raises(EngineCallError, match=r"POST /sleep.* the server is still awake"):
            await CONTROL.sleep(target, 1, SECONDS)


async def test_a_wake_that_had_no_effect() -> None:
    async with scripted({"/wake_up": DONE, "/is_sleeping": ASLEEP}) as target:
        with pytest.raises(EngineCallError, match=r"POST /wake_up .* the server is still asleep"):
            await CONTROL.wake(target, 1, SECONDS)


async def test_nothing_is_called_after_a_call_that_failed() -> None:
    seen: list[str] = []
    replies: Replies = {"/wake_up": DONE, "/collective_rpc": (500, b'{"error": {"message": "no such file"}}')}
    async with scripted(replies, seen) as target:
        with pytest.raises(EngineCallError, match=r"^POST /collective_rpc was answered with 500: no such file$"):
            await CONTROL.wake(target, 2, SECONDS)
    assert seen == ["/wake_up?tags=weights", "/collective_rpc"]


async def test_a_cache_that_could_not_be_emptied() -> None:
    replies: Replies = {"/wake_up": DONE, "/collective_rpc": DONE, "/reset_prefix_cache": (200, b'{"success": false}')}
    async with scripted(replies) as target:
        with pytest.raises(EngineCallError, match="POST /reset_prefix_cache was answered with success: false"):
            await CONTROL.wake(target, 2, SECONDS)


@pytest.mark.parametrize(("version", "first"), [("0.30.0", "/wake_up"), ("0.32.0+cpu", "/wake_up?tags=weights")])
async def test_the_way_deeper_depends_on_the_version(version: str, first: str) -> None:
    seen: list[str] = []
    answer = json.dumps({"version": version}).encode()
    replies: Replies = {"/version": (200, answer), "/wake_up": DONE, "/sleep": DONE, "/is_sleeping": ASLEEP}
    async with scripted(replies, seen) as target:
        await CONTROL.sleep(target, 2, SECONDS, deepen=True)
    assert seen == ["/version", first, "/sleep?level=2&mode=abort", "/is_sleeping"]


async def test_a_server_that_hangs_is_named() -> None:
    async with scripted({}) as target:
        with pytest.raises(EngineCallError, match=r"^POST /sleep\?level=1&mode=abort was not answered within 0\.1 s$"):
            await CONTROL.sleep(target, 1, 0.1)


async def test_the_deadline_is_for_all_calls_together() -> None:
    async with scripted({"/wake_up": DONE}) as target:
        with pytest.raises(
            EngineCallError, match=r"^POST /collective_rpc was not answered within 0\.2 s of the first call$"
        ):
            await CONTROL.wake(target, 2, 0.2)


async def test_a_server_without_a_gate() -> None:
    async with scripted({"/bullpen/gate": (404, b'{"detail": "Not Found"}')}) as target:
        with pytest.raises(EngineCallError, match=r"^GET /bullpen/gate was answered with 404: Not Found$"):
            await CONTROL.activity(target)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"open",
        b"[]",
        b'{"mode": "open"}',
        b'{"in_flight": null, "held": 0, "idle_seconds": 0, "mode": "open"}',
    ],
)
async def test_a_gate_that_says_something_else(body: bytes) -> None:
    async with scripted({"/bullpen/gate": (200, body)}) as target:
        with pytest.raises(EngineCallError, match="GET /bullpen/gate"):
            await CONTROL.activity(target)


async def test_a_model_that_generates_nothing_is_asked_for_an_embedding() -> None:
    seen: list[str] = []
    embedding = b'{"data": [{"embedding": [0.5, -1.0]}]}'
    replies: Replies = {"/v1/completions": (404, b'{"detail": "Not Found"}'), "/v1/embeddings": (200, embedding)}
    async with scripted(replies, seen) as target:
        assert await CONTROL.canary(target, SECONDS) == "embedding: [0.5, -1.0]"
    assert seen == ["/v1/completions", "/v1/embeddings"]


async def test_a_canary_that_says_nothing() -> None:
    async with scripted({"/v1/completions": (200, b"<html>")}) as target:
        with pytest.raises(EngineCallError, match="POST /v1/completions: no answer to a canary"):
            await CONTROL.canary(target, SECONDS)


async def test_the_servers_words_are_short_and_without_secrets() -> None:
    body = json.dumps({"error": "token hf_abcdefghijklmnopqrstuvwxyz " + "x\n" * 1000}).encode()
    async with scripted({"/v1/completions": (500, body)}) as target:
        with pytest.raises(EngineCallError) as caught:
            await CONTROL.warm_up(target, "/v1/completions", "{}", SECONDS)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "hf_abc" not in str(caught.value)
