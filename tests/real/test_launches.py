"""Launches on a real engine: driven by vllm-bootstrap's published client, and by Bullpen's own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import pytest

from bullpen.client import ClientError, LaunchFailed, NotReady, SyncVLLMManager, VLLMManager
from tests.real import minilm
from tests.real.serving import Models, engine_core
from tests.support.daemon import Daemon
from tests.support.published_client import needs_published_client, run_script

PLAIN: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32"}
POOLING: dict[str, Any] = {"max_model_len": 128, "enforce_eager": True, "dtype": "float32"}
PROMPTS = ["the model", "a warm start", "which one", "a cold start", "0 1 2"]
SCHEMA = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}, "model": {"enum": ["a", "b"]}},
    "required": ["warm", "model"],
    "additionalProperties": False,
}
STOP_SECONDS = 5.0
"""What a stop may take, by contract."""

START = """
import asyncio, json, sys, time
import grpc, httpx
from vllm_bootstrap_client import VLLMManager

URL = sys.argv[1]
GIVEN = json.loads(sys.argv[2])
seen = {}

async def refusal(awaitable):
    try:
        await awaitable
    except grpc.aio.AioRpcError as error:
        return [error.code().name, error.details()]
    except RuntimeError as error:
        return str(error)
"""
END = """
asyncio.run(main())
print(json.dumps(seen))
"""


async def published(daemon: Daemon, script: str, **given: Any) -> dict[str, Any]:
    """What a script of the published client saw; it is given the daemon's URL and JSON data."""
    seen: dict[str, Any] = await run_script(START + script + END, daemon.url, json.dumps(given))
    return seen


WRITE = """
async def main():
    async with VLLMManager(URL) as manager, httpx.AsyncClient(timeout=30) as http:
        async with manager.run(GIVEN["model"], extra_kwargs=GIVEN["kwargs"], ready_poll_interval=0.1) as launch:
            name, prompts = launch.launch_id, GIVEN["prompts"]
            seen["launch"] = [launch.model, launch.task, launch.state, launch.gpu_ids]
            url = (await http.get(f"{URL}/status/{name}")).json()["url"]

            async def by_rest(max_tokens, **options):
                body = {"model": GIVEN["model"], "prompt": prompts, "temperature": 0, **options}
                body["max_tokens"] = max_tokens
                return (await http.post(f"{url}/v1/completions", json=body)).json()

            async def words(prompts, max_tokens=24, **options):
                found = await manager.complete(name, prompts, max_tokens, temperature=0.0, **options)
                return [item.text for item in found]

            whole = await manager.complete(name, prompts, max_tokens=8, temperature=0.0)
            rest = await by_rest(8, repetition_penalty=1)
            seen["complete"] = [item.text for item in whole]
            seen["rest"] = [choice["text"] for choice in rest["choices"]]
            seen["counts"] = [sum(item.prompt_tokens for item in whole), sum(item.completion_tokens for item in whole)]
            seen["usage"] = [rest["usage"]["prompt_tokens"], rest["usage"]["completion_tokens"]]
            seen["by_config"] = [choice["text"] for choice in (await by_rest(8))["choices"]]
            seen["alone"] = [(await words([prompt], 8))[0] for prompt in prompts]
            seen["at_once"] = await asyncio.gather(*(words([prompt], 8) for prompt in prompts))
            stream = manager.complete_stream(name, prompts, max_tokens=8, temperature=0.0)
            seen["stream"] = [item.text async for item in stream]

            sixteen = await by_rest(16, repetition_penalty=1)
            seen["rest_16"] = [[choice["text"] for choice in sixteen["choices"]], sixteen["usage"]["completion_tokens"]]
            for max_tokens in (0, -5):
                found = await manager.complete(name, prompts, max_tokens, temperature=0.0)
                counted = sum(item.completion_tokens for item in found)
                seen[f"max_tokens {max_tokens}"] = [[item.text for item in found], counted]

            seen["json"] = await words(prompts[:2], 60, json_schema=json.dumps(GIVEN["schema"]))
            seen["regex"] = await words(prompts[:2], regex="[ab]{3}-[0-9]")
            seen["grammar"] = await words(prompts[:2], grammar='root ::= "up" | "down"')
            seen["choice"] = await words(prompts[:2], choice=["yes", "no"])
            seen["no_choice"] = await words(prompts, 8, choice=[])
            stream = manager.complete_stream(name, prompts[:2], 24, choice=["yes", "no"])
            seen["choice_stream"] = [item.text async for item in stream]

            seen["refused"] = {
                "schema": await refusal(words(prompts, json_schema="{no json")),
                "regex": await refusal(words(prompts, regex="(")),
                "long": await refusal(words(["the model " * 300])),
                "task": await refusal(manager.embed(name, ["a"])),
                "top_p": await refusal(words(prompts, top_p=7.0)),
            }
            seen["listed"] = [item.launch_id == name for item in await manager.list_launches()]
            first = await manager.logs(name)
            second = await manager.logs(name, offset=first.next_offset)
            seen["log"] = [first.offset, "Application startup complete" in first.content, "POST" in first.content]
            seen["log_goes_on"] = second.offset == first.next_offset
            stats = await manager.stats()
            seen["stats"] = [stats.gpu_count, stats.gpus, stats.cpu_count > 0, stats.memory_total_bytes > 0]
            seen["gpu_error"] = stats.nvidia_smi_error
        seen["state"] = (await manager.status(name)).state
        seen["ended"] = await refusal(words(prompts))
        seen["left"] = len(await manager.list_launches())
"""


@needs_published_client
async def test_the_published_client_has_texts_written(box: Daemon, models: Models) -> None:
    """One at a time, many at once, streamed and guided: they are those of the engine's own API, and in order.

    The model's own generation configuration wishes otherwise; it counts in the engine's own API alone.
    """
    model = str(models.folder / "tiny-opinions")
    terse = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    seen = await published(box, WRITE, model=model, kwargs={**PLAIN, **terse}, prompts=PROMPTS, schema=SCHEMA)
    assert seen["launch"] == [model, "generate", "ready", []]
    expected = seen["rest"]
    assert len(set(expected)) > 1 and all(expected)
    assert seen["by_config"] != expected
    assert seen["complete"] == seen["alone"] == seen["stream"] == seen["no_choice"] == expected
    assert seen["at_once"] == [[text] for text in expected]
    assert seen["counts"] == seen["usage"]
    assert seen["max_tokens 0"] == seen["max_tokens -5"] == seen["rest_16"]
    assert seen["rest_16"][1] > seen["usage"][1]

    for text in seen["json"]:
        assert set(json.loads(text)) == {"warm", "model"}
    assert all(len(text) == 5 and set(text[:3]) <= {"a", "b"} and text[3] == "-" for text in seen["regex"])
    assert set(seen["grammar"]) <= {"up", "down"}
    assert set(seen["choice"] + seen["choice_stream"]) <= {"yes", "no"}
    assert len(seen["grammar"]) == len(seen["choice"]) == len(seen["choice_stream"]) == 2

    refused = seen["refused"]
    for what in ("schema", "regex", "long", "top_p"):
        code, text = refused[what]
        assert code == "INTERNAL" and text.startswith("Generation failed: Subprocess error: "), refused
    assert refused["task"][0] == "FAILED_PRECONDITION"
    assert (seen["listed"], seen["log"], seen["log_goes_on"]) == ([True], [0, True, True], True)
    assert seen["stats"] == [0, [], True, True] and seen["gpu_error"]
    assert (seen["state"], seen["left"], seen["ended"][0]) == ("stopped", 0, "FAILED_PRECONDITION")


EMBED = """
async def main():
    async with VLLMManager(URL) as manager:
        model, kwargs, texts = GIVEN["model"], GIVEN["kwargs"], GIVEN["texts"]
        async with manager.run(model, task="embed", extra_kwargs=kwargs, ready_poll_interval=0.1) as launch:
            name = launch.launch_id
            seen["task"] = launch.task
            seen["whole"] = await manager.embed(name, texts)
            seen["stream"] = [vector async for vector in manager.embed_stream(name, texts)]
            seen["alone"] = [(await manager.embed(name, [text]))[0] for text in texts]
            seen["refused"] = await refusal(manager.complete(name, texts, max_tokens=4))
            seen["long"] = await refusal(manager.embed(name, ["warm " * 400]))
"""


@needs_published_client
async def test_the_published_client_has_texts_embedded(box: Daemon) -> None:
    """The vectors are those that transformers computes from the same weights, to 1e-5."""
    seen = await published(box, EMBED, model=minilm.FOLDER, kwargs=POOLING, texts=minilm.SENTENCES)
    assert seen["task"] == "embed"
    for way in ("whole", "stream", "alone"):
        assert minilm.differs(seen[way]) < 1e-5
    code, text = seen["refused"]
    assert code == "FAILED_PRECONDITION" and "has task 'embed', expected 'generate'" in text
    code, text = seen["long"]
    assert code == "INTERNAL" and text.startswith("Embedding failed: Subprocess error: ")


FAIL = """
async def stop(manager, launch_id):
    began = time.monotonic()
    state = (await manager.stop(launch_id)).state
    return [state, time.monotonic() - began]

async def main():
    async with VLLMManager(URL) as manager, httpx.AsyncClient() as http:
        kwargs = GIVEN["kwargs"]
        for what, model in GIVEN["broken"].items():
            launch = await manager.launch(model, extra_kwargs=kwargs)
            said = await refusal(manager.wait_until_ready(launch.launch_id, poll_interval=0.1, timeout=50))
            ended = await manager.status(launch.launch_id)
            seen[what] = [said == f"Launch {launch.launch_id} reached terminal state: failed ({ended.error})"]
            seen[what] += [ended.state, ended.error, (await manager.logs(launch.launch_id)).content]
            seen[what] += [(await manager.stop(launch.launch_id)).state]
        seen["stops"] = []
        for phase in GIVEN["phases"]:
            launch = await manager.launch(GIVEN["model"], extra_kwargs=kwargs)
            while (await http.get(f"{URL}/status/{launch.launch_id}")).json()["phase"] not in (phase, None):
                await asyncio.sleep(0.005)
            stopped = await stop(manager, launch.launch_id)
            seen["stops"].append([*stopped, (await manager.status(launch.launch_id)).error])
        try:
            async with manager.run(GIVEN["model"], extra_kwargs=kwargs, ready_timeout=0.01, ready_poll_interval=0.02):
                pass
        except TimeoutError as error:
            seen["late"] = str(error)
        seen["left"] = len(await manager.list_launches())
"""


@needs_published_client
async def test_the_published_client_and_launches_that_never_become_ready(box: Daemon, models: Models) -> None:
    """What cannot be loaded fails and says why; what is stopped while it loads is stopped, in time."""
    unknown, nowhere, elsewhere = str(models.folder / "unknown"), str(models.folder / "nowhere"), "org/nowhere"
    broken = {"unknown": unknown, "nowhere": nowhere, "elsewhere": elsewhere}
    phases = ["preparing", "start", "weights", "kv_cache"]
    model = str(models.folder / "tiny-a")
    seen = await published(box, FAIL, model=model, kwargs=PLAIN, broken=broken, phases=phases)
    for what, word in (("unknown", "NobodyKnowsForCausalLM"), ("nowhere", nowhere), ("elsewhere", elsewhere)):
        same, state, error, log, after = seen[what]
        assert (same, state, after) == (True, "failed", "failed"), seen[what]
        assert word in error
        # Where there is no such folder no process is begun.
        assert ("Traceback" in log) == (what != "nowhere"), log
    assert [(state, error) for state, _, error in seen["stops"]] == [("stopped", None)] * len(phases)
    assert all(seconds < STOP_SECONDS for _, seconds, _ in seen["stops"]), seen["stops"]
    assert "not ready after 0.01s" in seen["late"]
    assert seen["left"] == 0


# -- Bullpen's own client ------------------------------------------------------------------------------------------


async def test_the_own_client(box: Daemon, models: Models) -> None:
    """Everything that the published one can do, and chats, tokens as they are written, and what finishes first."""
    model, greedy = str(models.folder / "tiny-a"), {"temperature": 0.0}
    phases: list[str | None] = []
    async with VLLMManager(box.url) as manager:
        extra: Any = {"extra_kwargs": PLAIN, "on_progress": lambda launch: phases.append(launch.phase)}
        async with (
            manager.run(model, **extra) as launch,
            manager.run(minilm.FOLDER, task="embed", extra_kwargs=POOLING) as embedder,
        ):
            name = launch.launch_id
            url = box.http.get(f"/status/{name}").json()["url"]
            body = {"model": model, "prompt": PROMPTS, "max_tokens": 8, **greedy}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
            expected = [choice["text"] for choice in answer["choices"]]

            one = await manager.complete(name, prompt=PROMPTS[0], max_tokens=8, temperature=0.0)
            assert one.text == expected[0]
            many = await manager.complete(name, PROMPTS, 8, temperature=0.0)
            assert [item.text for item in many] == expected
            streamed = [item.text async for item in manager.complete_stream(name, PROMPTS, 8, temperature=0.0)]
            assert streamed == expected
            found = {
                item.index: item.completion.text
                async for item in manager.complete_each(name, PROMPTS, max_tokens=8, temperature=0.0)
            }
            assert [found[place] for place in range(len(PROMPTS))] == expected
            pieces = [piece async for piece in manager.stream(name, prompt=PROMPTS[0], max_tokens=8, temperature=0.0)]
            assert "".join(piece.text for piece in pieces) == expected[0]
            assert len(pieces) > 1

            conversation = [{"role": "user", "content": "Who is warm?"}]
            chat = await manager.chat(name, conversation, max_tokens=12, temperature=0.0)
            body = {"model": model, "messages": conversation, "max_tokens": 12, **greedy}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
            assert chat.text == answer["choices"][0]["message"]["content"]
            assert chat.completion_tokens == answer["usage"]["completion_tokens"]
            talk = manager.stream(name, conversation=conversation, max_tokens=12, temperature=0.0)
            assert "".join([piece.text async for piece in talk]) == chat.text

            choice = await manager.complete(name, PROMPTS, 8, choice=["yes", "no"])
            assert {item.text for item in choice} <= {"yes", "no"}
            assert minilm.differs(await manager.embed(embedder.launch_id, minilm.SENTENCES)) < 1e-5
            assert {one.launch_id for one in await manager.list_launches()} == {name, embedder.launch_id}
        assert (await manager.status(name)).state == "stopped"
        assert len(set(phases)) > 2 and phases[-1] is None
        log = "".join([piece.content async for piece in manager.follow_logs(name)])
        assert "Application startup complete" in log and "POST /v1/chat/completions" in log

        with pytest.raises(LaunchFailed, match="NobodyKnowsForCausalLM"):
            async with manager.run(str(models.folder / "unknown"), extra_kwargs=PLAIN):
                pass
        loading = await manager.launch(model, extra_kwargs=PLAIN)
        async with asyncio.timeout(STOP_SECONDS):
            assert (await manager.stop(loading.launch_id)).state == "stopped"
        assert await manager.list_launches() == []


def test_the_own_client_without_await(box: Daemon, models: Models) -> None:
    """The synchronous twin does the same."""
    model = str(models.folder / "tiny-a")
    with SyncVLLMManager(box.url) as manager:
        with manager.run(model, extra_kwargs=PLAIN) as launch:
            name = launch.launch_id
            many = manager.complete(name, PROMPTS, 8, temperature=0.0)
            assert [item.text for item in manager.complete_stream(name, PROMPTS, 8, temperature=0.0)] == [
                item.text for item in many
            ]
            assert manager.complete(name, prompt=PROMPTS[0], max_tokens=8, temperature=0.0).text == many[0].text
            pieces = [piece.text for piece in manager.stream(name, prompt=PROMPTS[0], max_tokens=8, temperature=0.0)]
            assert "".join(pieces) == many[0].text
            assert manager.chat(name, [{"role": "user", "content": "x"}], max_tokens=4).completion_tokens == 4
            assert [one.launch_id for one in manager.list_launches()] == [name]
            assert "Application startup complete" in manager.logs(name).content
            assert manager.stats().gpu_count == 0
        assert manager.status(name).state == "stopped"
        with manager.run(minilm.FOLDER, task="embed", extra_kwargs=POOLING) as launch:
            assert minilm.differs(manager.embed(launch.launch_id, minilm.SENTENCES)) < 1e-5
            assert minilm.differs(list(manager.embed_stream(launch.launch_id, minilm.SENTENCES))) < 1e-5
        assert manager.list_launches() == []


async def test_an_engine_that_is_killed(box: Daemon, models: Models) -> None:
    """What is under way ends, calls are told of a crash until the launch is known to have failed, and then of that."""
    longest = {**PLAIN, "max_model_len": 21_000}
    async with VLLMManager(box.url) as manager, asyncio.timeout(60):
        async with manager.run(str(models.folder / "tiny-long"), extra_kwargs=longest) as launch:
            name = launch.launch_id
            under_way = manager.stream(name, prompt="the model", max_tokens=20_000, ignore_eos=True)
            await anext(under_way)
            os.kill(engine_core(box.http.get(f"/status/{name}").json()["pid"]), signal.SIGKILL)
            said = set()
            while (await manager.status(name)).state == "ready":
                with pytest.raises(NotReady) as refused:
                    await manager.complete(name, prompt="the model", max_tokens=4)
                said.add(str(refused.value))
            with pytest.raises(ClientError):
                async for _ in under_way:
                    pass
            assert said <= {f"Launch {name} {end}" for end in ("subprocess crashed", "is not ready (state=failed)")}
            ended = await manager.status(name)
            assert ended.state == "failed" and ended.error
        assert (await manager.status(name)).state == "failed"
