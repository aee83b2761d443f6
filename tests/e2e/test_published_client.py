"""vllm-bootstrap's published client drives a daemon, over REST and gRPC, from a launch to its stop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from bullpen.sim import words
from tests.support.daemon import Daemon
from tests.support.published_client import needs_published_client, run_script

MODEL = "test/model"

SCRIPT = """
import asyncio, json, sys
import grpc, httpx
from vllm_bootstrap_client import VLLMManager

URL, MODEL = sys.argv[1:]

async def status_of(awaitable):
    try:
        await awaitable
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    except grpc.aio.AioRpcError as error:
        return [error.code().name, error.details()]

async def main():
    seen = {}
    async with VLLMManager(URL, access_key="key") as manager:
        launch = await manager.launch(MODEL, gpu_ids=[0], extra_kwargs={"max_model_len": 1000})
        writer = launch.launch_id
        seen["launched"] = [launch.model, launch.gpu_ids, launch.task, launch.state]
        seen["conflict"] = await status_of(manager.launch(MODEL))
        embedder = (await manager.launch(MODEL, task="embed", gpu_ids=[1])).launch_id
        for launch_id in (writer, embedder):
            seen["ready"] = (await manager.wait_until_ready(launch_id, poll_interval=0.05, timeout=30)).state
        one = await manager.complete(writer, ["hello there"], max_tokens=5)
        seen["complete"] = [[item.text, item.prompt_tokens, item.completion_tokens] for item in one]
        seen["many"] = [item.text for item in await manager.complete(writer, ["x", "y", "z"], max_tokens=5)]
        seen["stream"] = [item.text async for item in manager.complete_stream(writer, ["a", "b"], max_tokens=3)]
        seen["embed"] = await manager.embed(embedder, ["a", "b"])
        seen["embed_stream"] = [item async for item in manager.embed_stream(embedder, ["a", "b"])]
        seen["wrong_task"] = await status_of(manager.embed(writer, ["a"]))
        seen["listed"] = [item.launch_id for item in await manager.list_launches()] == [writer, embedder]
        log = await manager.logs(writer)
        seen["log"] = [log.offset, log.next_offset == len(log.content.encode()), "Application startup" in log.content]
        seen["gpu_count"] = (await manager.stats()).gpu_count
        seen["stopped"] = [(await manager.stop(launch_id)).state for launch_id in (writer, embedder, writer)]
        seen["left"] = len(await manager.list_launches())
        seen["ended"] = (await status_of(manager.complete(writer, ["a"], max_tokens=1)))[0]
        seen["unknown"] = [await status_of(manager.status("?")), await status_of(manager.embed("?", ["a"]))]
        async with manager.run(MODEL, ready_poll_interval=0.05) as launch:
            seen["run"] = [(await manager.complete(launch.launch_id, ["hello there"], max_tokens=5))[0].text]
        seen["run"] += [(await manager.status(launch.launch_id)).state]
    async with VLLMManager(URL, access_key="other") as manager:
        seen["stranger"] = [await status_of(manager.stats()), await status_of(manager.embed("?", ["a"]))]
    print(json.dumps(seen))

asyncio.run(main())
"""


def completion(prompt: str, tokens: int) -> str:
    """What the simulator's model says to a prompt."""
    return "".join(islice(words.completion(MODEL, prompt), tokens))


@needs_published_client
async def test_from_launch_to_stop(start_daemon: Callable[..., Daemon]) -> None:
    """Its README's steps on a host with two GPUs, with an access key, and what it is refused."""
    daemon = start_daemon(grpc_port=None, access_key="key", mock_gpus=True, mock_gpu_count=2)
    daemon.wait_grpc()
    seen = await run_script(SCRIPT, daemon.url, MODEL)
    vectors = [pytest.approx(words.vector(MODEL, text), abs=1e-7) for text in "ab"]
    expected = {
        "launched": [MODEL, [0], "generate", "bootstrapping"],
        "conflict": 409,
        "ready": "ready",
        "complete": [[completion("hello there", 5), 2, 5]],
        "many": [completion(text, 5) for text in "xyz"],
        "stream": [completion("a", 3), completion("b", 3)],
        "embed": vectors,
        "embed_stream": vectors,
        "listed": True,
        "log": [0, True, True],
        "gpu_count": 2,
        "stopped": ["stopped"] * 3,
        "left": 0,
        "ended": "FAILED_PRECONDITION",
        "unknown": [404, ["NOT_FOUND", "Unknown launch_id: ?"]],
        "run": [completion("hello there", 5), "stopped"],
        "stranger": [401, ["UNAUTHENTICATED", "Invalid or missing access key"]],
    }
    code, text = seen.pop("wrong_task")
    assert code == "FAILED_PRECONDITION" and "has task 'generate', expected 'embed'" in text
    assert seen == expected
