"""vllm-bootstrap's published client where things go wrong: refusals, races, crashes, and what `run` leaves behind."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from bullpen.sim import words
from tests.support.daemon import Daemon
from tests.support.published_client import needs_published_client, run_script

MODEL = "test/model"
STOP_SECONDS = 5.0
"""What a stop may take, by contract."""
IDLE_SECONDS = 6.0
"""Between two requests of a caller that asks seldom; some servers close a connection after 5 s."""

START = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
import grpc, httpx
from vllm_bootstrap_client import VLLMManager

URL, KEY, FAIL_FILE = sys.argv[1:]
MODEL = "test/model"
seen = {}

async def refusal(awaitable):
    try:
        await awaitable
    except httpx.HTTPStatusError as error:
        return [error.response.status_code, error.response.json()["detail"]]
    except grpc.aio.AioRpcError as error:
        return [error.code().name, error.details()]

async def drained(stream):
    return [item async for item in stream]

async def four(manager, launch_id, inputs=("x",), max_tokens=4):
    complete, embed = (launch_id, list(inputs), max_tokens), (launch_id, list(inputs))
    calls = [manager.complete(*complete), drained(manager.complete_stream(*complete))]
    calls += [manager.embed(*embed), drained(manager.embed_stream(*embed))]
    return [await refusal(call) for call in calls]

async def ready(manager, launch_id):
    return await manager.wait_until_ready(launch_id, poll_interval=0.05, timeout=30)

async def raw(launch_id):
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}) as http:
        return (await http.get(f"{URL}/status/{launch_id}")).json()

async def in_flight(launch_id):
    url = (await raw(launch_id))["url"]
    async with httpx.AsyncClient() as http:
        return (await http.get(f"{url}/bullpen/gate")).json()["in_flight"]

async def eventually(condition):
    deadline = time.monotonic() + 20
    while not await condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)

async def main():
    async with VLLMManager(URL, access_key=KEY) as manager:
        await script(manager)
        seen["left"] = len(await manager.list_launches())
"""
END = """
asyncio.run(main())
print(json.dumps(seen))
"""

pytestmark = needs_published_client
Published = Callable[[Daemon, str], Any]


@pytest.fixture
def fail_file(tmp_path: Path) -> Path:
    """What the simulator fails at."""
    return tmp_path / "fail"


@pytest.fixture
def box(start_daemon: Callable[..., Daemon], fail_file: Path) -> Daemon:
    """One GPU; launches take a while to load and write slowly. The key has a colon in it, and was set untidily."""
    slow = {"BULLPEN_SIM_START_SECONDS": "0.6", "BULLPEN_SIM_TOKENS_PER_SECOND": "200"}
    daemon = start_daemon(
        grpc_port=None,
        mock_gpus=True,
        mock_gpu_count=1,
        access_key=" s3:cret ",
        environment={**slow, "BULLPEN_SIM_FAIL_FILE": str(fail_file)},
    ).wait_warm()
    daemon.wait_grpc()
    daemon.http.headers["authorization"] = "Bearer s3:cret"
    return daemon


@pytest.fixture
def published(fail_file: Path) -> Callable[[Daemon, str], Any]:
    """What a script of the published client saw; nothing of it is left."""

    async def run(box: Daemon, script: str) -> dict[str, Any]:
        seen: dict[str, Any] = await run_script(START + script + END, box.url, "s3:cret", str(fail_file))
        assert seen.pop("left") == 0
        return seen

    return run


REFUSALS = """
async def script(manager):
    launch = await manager.launch(MODEL)
    name = launch.launch_id
    seen["name"] = name
    seen["young"] = await four(manager, name)
    bodies = {"blank": {"model": "  "}, "none": {"gpu_ids": []}, "missing": {"gpu_ids": [7]}, "taken": {}}
    for what, body in bodies.items():
        seen[what] = await refusal(manager.launch(**{"model": MODEL, **body}))
    for what, body in {"task": {"task": "chat"}, "empty": {"model": ""}, "half": {"gpu_ids": [0.5]}}.items():
        code, problems = await refusal(manager.launch(**{"model": MODEL, **body}))
        seen[what] = [code, problems[0]["loc"], "input" in problems[0]]
    calls = (manager.status("none"), manager.logs("none"), manager.stop("none"))
    seen["unknown"] = [await refusal(call) for call in calls]
    seen["offset"] = (await refusal(manager.logs("none", offset=-1)))[0]
    seen["no launch"] = await four(manager, "none")
    seen["no inputs"] = await four(manager, "none", inputs=())

    await ready(manager, name)
    seen["ready"] = await four(manager, name)
    Path(FAIL_FILE).write_text("request")
    seen["engine"] = await four(manager, name)
    Path(FAIL_FILE).unlink()
    seen["beyond"] = await manager.logs(name, offset=10**12)
    seen["beyond"] = [seen["beyond"].offset, seen["beyond"].next_offset, seen["beyond"].content]
    seen["size"] = (await manager.logs(name)).next_offset
    await manager.stop(name)
    seen["stopped"] = await four(manager, name)

    embedder = await manager.launch(MODEL, task="embed")
    await ready(manager, embedder.launch_id)
    seen["embedder"] = [embedder.launch_id, await four(manager, embedder.launch_id)]
    await manager.stop(embedder.launch_id)
    async with VLLMManager(URL, access_key="s3") as stranger, VLLMManager(URL) as nobody:
        for client in (stranger, nobody):
            seen.setdefault("strangers", []).extend(await four(client, name))
            calls = [client.launch(MODEL), client.status(name), client.logs(name), client.stop(name), client.stats()]
            seen.setdefault("strangers by rest", []).extend([(await refusal(call))[0] for call in calls])
"""


async def test_refusals(box: Daemon, published: Published) -> None:
    """Each has its status and its sentence, over REST and gRPC, at once and streamed."""
    seen = await published(box, REFUSALS)
    name = seen["name"]
    assert seen["blank"] == [400, "model must be provided"]
    assert seen["none"] == [400, "gpu_ids cannot be empty"]
    assert seen["missing"] == [400, "Requested GPUs are not available: [7]"]
    assert seen["taken"] == [409, f"Requested GPUs are in use (gpu 0 -> {name})"]
    assert seen["task"] == [422, ["body", "task"], False]
    assert seen["empty"] == [422, ["body", "model"], False]
    assert seen["half"] == [422, ["body", "gpu_ids", 0], False]
    assert seen["unknown"] == [[404, "Unknown launch_id: none"]] * 3
    assert seen["offset"] == 422

    def precondition(text: str) -> list[str]:
        return ["FAILED_PRECONDITION", text]

    assert seen["young"] == [precondition(f"Launch {name} is not ready (state=bootstrapping)")] * 4
    assert seen["stopped"] == [precondition(f"Launch {name} is not ready (state=stopped)")] * 4
    assert seen["no launch"] == [["NOT_FOUND", "Unknown launch_id: none"]] * 4
    empty = [["INVALID_ARGUMENT", f"{what} must not be empty"] for what in ("prompts", "texts")]
    assert seen["no inputs"] == [empty[0], empty[0], empty[1], empty[1]]
    wrong = precondition(f"Launch {name} has task 'generate', expected 'embed'")
    assert seen["ready"] == [None, None, wrong, wrong]
    works = ("Generation", "Generation stream")
    for work, (code, text) in zip(works, seen["engine"][:2], strict=True):
        assert code == "INTERNAL" and text.startswith(f"{work} failed: Subprocess error: ")
    embedder, found = seen["embedder"]
    wrong = precondition(f"Launch {embedder} has task 'embed', expected 'generate'")
    assert found == [wrong, wrong, None, None]
    assert seen["beyond"] == [seen["size"], seen["size"], ""]
    assert seen["strangers"] == [["UNAUTHENTICATED", "Invalid or missing access key"]] * 8
    assert seen["strangers by rest"] == [401] * 10


RACES = """
async def script(manager):
    async def attempt():
        try:
            return await manager.launch(MODEL, gpu_ids=[0])
        except httpx.HTTPStatusError as error:
            return [error.response.status_code, error.response.json()["detail"]]

    found = await asyncio.gather(*(attempt() for _ in range(8)))
    (won,) = [one for one in found if not isinstance(one, list)]
    seen["lost"] = [one for one in found if isinstance(one, list)]
    seen["owner"] = won.launch_id
    stops = await asyncio.gather(*(manager.stop(won.launch_id) for _ in range(8)))
    seen["stops"] = sorted({one.state for one in stops})
    seen["final"] = [(await manager.stop(won.launch_id)).state, (await manager.status(won.launch_id)).error]

    seen["seconds"] = []
    for delay in (0, 0.05, 0.3, 0.6, 0.7):
        launch = await manager.launch(MODEL)
        await asyncio.sleep(delay)
        waiting = asyncio.create_task(manager.wait_until_ready(launch.launch_id, poll_interval=0.02))
        began = time.monotonic()
        stopped = await manager.stop(launch.launch_id)
        seen["seconds"].append(time.monotonic() - began)
        try:
            await waiting  # it was ready already, or hears of the end
        except RuntimeError as error:
            assert str(error) == f"Launch {launch.launch_id} reached terminal state: stopped", error
        seen.setdefault("states", []).append([stopped.state, stopped.error])

    writer = (await manager.launch(MODEL)).launch_id
    await ready(manager, writer)
    calls = [asyncio.create_task(refusal(manager.complete(writer, ["x"], 100_000))) for _ in range(4)]
    await eventually(lambda: busy(writer, 4))
    calls[0].cancel()
    await eventually(lambda: busy(writer, 3))
    stream = manager.complete_stream(writer, ["x", "y"], 2)
    seen["beside"] = [item.text async for item in stream]
    began = time.monotonic()
    seen["stopped"] = (await manager.stop(writer)).state
    seen["seconds"].append(time.monotonic() - began)
    seen["writer"] = writer
    seen["ends"] = await asyncio.gather(*calls[1:])

async def busy(launch_id, count):
    return await in_flight(launch_id) == count
"""


async def test_races(box: Daemon, published: Published) -> None:
    """One of many launches wins the GPU; stops at any moment are in time, final, and end the calls under way."""
    seen = await published(box, RACES)
    assert seen["lost"] == [[409, f"Requested GPUs are in use (gpu 0 -> {seen['owner']})"]] * 7
    assert seen["stops"] == ["stopped"]
    assert seen["final"] == ["stopped", None]
    assert seen["states"] == [["stopped", None]] * 5
    assert all(seconds < STOP_SECONDS for seconds in seen["seconds"]), seen["seconds"]
    assert seen["stopped"] == "stopped"
    for code, text in seen["ends"]:
        assert code == "FAILED_PRECONDITION"
        assert text in (
            f"Launch {seen['writer']} is not ready (state=stopping)",
            f"Launch {seen['writer']} is not ready (state=stopped)",
        )
    assert all(seen["beside"]) and len(seen["beside"]) == 2


ENGINE_DEATH = """
async def script(manager):
    name = seen["name"] = (await manager.launch(MODEL)).launch_id
    await ready(manager, name)
    calls = [manager.complete(name, ["x"], 100_000), drained(manager.complete_stream(name, ["x", "y"], 100_000))]
    tasks = [asyncio.create_task(refusal(call)) for call in calls]
    async def busy():
        return await in_flight(name) == 2
    await eventually(busy)
    server = (await raw(name))["pid"]
    (engine,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    os.kill(int(engine), signal.SIGKILL)
    seen["calls"] = await asyncio.gather(*tasks)
    async def failed():
        return (await manager.status(name)).state == "failed"
    await eventually(failed)
    seen["error"] = (await manager.status(name)).error
"""


async def test_a_server_whose_engine_dies(box: Daemon, published: Published) -> None:
    """To callers it is a crash, although that server still answers."""
    seen = await published(box, ENGINE_DEATH)
    name = seen["name"]
    for code, text in seen["calls"]:
        assert code == "FAILED_PRECONDITION"
        assert text in (f"Launch {name} subprocess crashed", f"Launch {name} is not ready (state=failed)")
    assert seen["error"]


CRASH = """
async def script(manager):
    first = (await manager.launch(MODEL)).launch_id
    await ready(manager, first)
    call = asyncio.create_task(refusal(manager.complete(first, ["x"], 100_000)))
    async def busy():
        return await in_flight(first) == 1
    await eventually(busy)
    os.kill((await raw(first))["pid"], signal.SIGKILL)
    seen["call"] = await call
    async def failed():
        return (await manager.status(first)).state == "failed"
    await eventually(failed)
    seen["next"] = await four(manager, first)
    seen["error"] = (await manager.status(first)).error
    seen["stop"] = (await manager.stop(first)).state
    seen["name"] = first
    second = await manager.launch(MODEL)
    seen["gpus"] = second.gpu_ids
    os.kill(await pid(second.launch_id), signal.SIGKILL)
    try:
        await manager.wait_until_ready(second.launch_id, poll_interval=0.02, timeout=20)
    except RuntimeError as error:
        seen["second"] = [str(error), second.launch_id, (await manager.status(second.launch_id)).error]

async def pid(launch_id):
    async def begun():
        return (await raw(launch_id))["pid"] is not None
    await eventually(begun)
    return (await raw(launch_id))["pid"]
"""


async def test_crashes(box: Daemon, published: Published) -> None:
    """A server that is killed is a failed launch that says so, while it loads too; its GPU is free."""
    seen = await published(box, CRASH)
    name = seen["name"]
    assert seen["call"][0] == "FAILED_PRECONDITION"
    assert seen["call"][1] in (f"Launch {name} subprocess crashed", f"Launch {name} is not ready (state=failed)")
    assert seen["next"] == [["FAILED_PRECONDITION", f"Launch {name} is not ready (state=failed)"]] * 4
    assert seen["error"]
    assert seen["stop"] == "failed"
    assert seen["gpus"] == [0]
    said, second, error = seen["second"]
    assert error and said == f"Launch {second} reached terminal state: failed ({error})"


RUNS = """
async def script(manager):
    fast = {"ready_poll_interval": 0.02}

    async def normal(names):
        async with manager.run(MODEL, **fast) as launch:
            names.append(launch.launch_id)

    async def body(names):
        async with manager.run(MODEL, **fast) as launch:
            names.append(launch.launch_id)
            raise KeyError("mine")

    async def failure(names):
        Path(FAIL_FILE).write_text("start")
        try:
            async with manager.run(MODEL, **fast):
                pass
        finally:
            Path(FAIL_FILE).unlink()

    async def late(names):
        async with manager.run(MODEL, ready_timeout=0.1, **fast):
            pass

    async def cancelled(names):
        async def inside():
            async with manager.run(MODEL, **fast) as launch:
                names.append(launch.launch_id)
                await asyncio.sleep(60)
        await cut(inside, lambda: names)

    async def cancelled_early(names):
        async def inside():
            async with manager.run(MODEL, **fast):
                raise AssertionError("it cannot be ready yet")
        async def exists():
            return bool(await manager.list_launches())
        task = asyncio.create_task(inside())
        await eventually(exists)
        await asyncio.sleep(0.1)  # the client has the answer and polls
        task.cancel()
        await task

    async def refused(names):
        other = await manager.launch(MODEL)
        try:
            async with manager.run(MODEL, **fast):
                pass
        finally:
            seen["untouched"] = (await manager.status(other.launch_id)).state
            await manager.stop(other.launch_id)

    async def stopped_inside(names):
        async with manager.run(MODEL, **fast) as launch:
            names.append(launch.launch_id)
            await manager.stop(launch.launch_id)

    async def cut(inside, condition):
        task = asyncio.create_task(inside())
        while not condition():
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    for case in (normal, body, failure, late, cancelled, cancelled_early, refused, stopped_inside):
        names, began = [], time.monotonic()
        try:
            await case(names)
            raised = None
        except BaseException as error:
            raised = [type(error).__name__, str(error)]
        states = [(await manager.status(name)).state for name in names]
        seen[case.__name__] = [raised, states, len(await manager.list_launches())]
"""


async def test_run_leaves_nothing_behind(box: Daemon, published: Published) -> None:
    """However the block ends the launch is stopped, and what was raised is what the caller hears."""
    seen = await published(box, RUNS)
    assert seen["normal"] == seen["stopped_inside"] == [None, ["stopped"], 0]
    assert seen["body"] == [["KeyError", "'mine'"], ["stopped"], 0]
    raised, states, left = seen["failure"]
    assert raised[0] == "RuntimeError" and "reached terminal state: failed (" in raised[1]
    assert (states, left) == ([], 0)
    raised, states, left = seen["late"]
    assert raised[0] == "TimeoutError" and "not ready after 0.1s (state=bootstrapping)" in raised[1]
    assert (states, left) == ([], 0)
    assert seen["cancelled"] == [["CancelledError", ""], ["stopped"], 0]
    assert seen["cancelled_early"] == [["CancelledError", ""], [], 0]
    raised, states, left = seen["refused"]
    assert raised[0] == "HTTPStatusError" and "409" in raised[1]
    assert (states, left, seen["untouched"]) == ([], 0, "bootstrapping")


LARGE = """
async def script(manager):
    async with manager.run(MODEL, task="embed", ready_poll_interval=0.05) as launch:
        texts = [f"{number} " + "x" * 2000 for number in range(2500)]
        seen["bytes"] = sum(map(len, texts))
        vectors = await manager.embed(launch.launch_id, texts)
        streamed = [vector async for vector in manager.embed_stream(launch.launch_id, texts[:300])]
        seen["first"] = vectors[0]
        seen["last"] = vectors[-1]
        seen["counts"] = [len(vectors), len({tuple(vector) for vector in vectors}), streamed == vectors[:300]]
"""


async def test_messages_of_more_than_four_mib(box: Daemon, published: Published) -> None:
    """They go through whole and in order."""
    seen = await published(box, LARGE)
    assert seen["bytes"] > 4 * 2**20
    assert seen["counts"] == [2500, 2500, True]
    for key, number in (("first", 0), ("last", 2499)):
        assert seen[key] == pytest.approx(words.vector(MODEL, f"{number} " + "x" * 2000), abs=1e-7)


@pytest.mark.parametrize("password", ["s3:cret", " s3:cret "])
def test_key_as_a_password(box: Daemon, password: str) -> None:
    """A browser that was asked for user and password is let in; spaces around the key do not count."""
    assert httpx.get(f"{box.url}/launch").status_code == 401
    assert httpx.get(f"{box.url}/launch", auth=("anyone", password)).status_code == 200


@pytest.mark.slow
def test_a_caller_that_asks_seldom_keeps_its_connection(box: Daemon) -> None:
    """A connection that is closed just as it is used again is an error to a client that does not try again."""
    address = urlsplit(box.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    connection.auto_open = 0
    connection.connect()
    for pause in (IDLE_SECONDS, 0.0):
        connection.request("GET", "/launch", headers={"Authorization": "Bearer s3:cret"})
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())) == (200, [])
        time.sleep(pause)
    connection.close()
