"""Requests of the OpenAI API that go to an instance's own server as they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from bullpen.proto import v1 as pb
from bullpen.rpc.relay import PATHS
from tests.rpc.engine import Asked, scripted
from tests.rpc.serving import Rpc, completion, refused, serving

Code = grpc.StatusCode
PATH = "/v1/completions"


def request(body: bytes | dict[str, Any] | None = None, path: str = PATH, instance_id: str = "gen") -> pb.RelayRequest:
    content = body if isinstance(body, bytes) else json.dumps(body or {"prompt": "x"}).encode()
    return pb.RelayRequest(instance_id=instance_id, path=path, body=content)


@pytest.mark.parametrize("status", [200, 400, 404, 429, 500, 503])
async def test_requests_and_answers_pass_byte_for_byte(status: int) -> None:
    said = b' {"answer" :  "\xc3\xa9\\u00e9", "choices": []}\r\n' if status != 404 else b"\xff no JSON \x00"
    sent = b'{ "prompt":"\\u00e9 \xc3\xa9",   "max_tokens" : 1e0 }\n'

    async def script(asked: Asked) -> None:
        await asked.raw(said, status)

    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add("gen", address, api_key="its own")
        assert await rpc.relay(request(sent)) == pb.RelayResponse(status=status, body=said)
        (asked,) = engine.asked
        assert (asked.path, asked.content, asked.headers["authorization"]) == (PATH, sent, "bearer its own")


async def test_what_a_server_itself_says(rpc: Rpc) -> None:
    answer = await rpc.relay(request({"prompt": "one two", "max_tokens": 3}))
    assert answer.status == 200 and json.loads(answer.body)["choices"][0]["text"] == completion("one two", 3)
    answer = await rpc.relay(request({"input": "x"}, "/v1/embeddings", "emb"))
    assert answer.status == 200 and json.loads(answer.body)["data"][0]["embedding"]
    for body, status in ((b"", 400), (b"{", 400), (b'["stream"]', 400), ({"prompt": "x", "model": "other"}, 404)):
        answer = await rpc.relay(request(body))
        assert answer.status == status and json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_every_path_of_inference_is_open_for_any_task(path: str) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"path": asked.path})

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        rpc.book.add("emb", address, "embed")
        for instance_id in ("gen", "emb"):
            answer = await rpc.relay(request(path=path, instance_id=instance_id))
            assert (answer.status, json.loads(answer.body)) == (200, {"path": path})


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/models",
        "/bullpen/gate",
        "/v1/../sleep",
        "/v1/completions/../../sleep",
        "/v1/completions/",
        "/v1/completions?x=1",
        "//v1/completions",
        "v1/completions",
        "/V1/completions",
        "/v1/completions HTTP/1.1\r\nx: y\r\n\r\n",
        "http://127.0.0.1/v1/completions",
    ],
)
async def test_every_other_path_is_closed(path: str) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({})

    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add("gen", address)
        code, said = await refused(rpc.relay(request(path=path)))
        assert code is Code.INVALID_ARGUMENT and "is no path of inference; those are /v1/chat/completions, " in said
        assert engine.asked == []


async def test_streams_are_refused(rpc: Rpc) -> None:
    code, said = await refused(rpc.relay(request({"prompt": "x", "stream": True})))
    assert code is Code.INVALID_ARGUMENT and "leave 'stream' out" in said
    for body in ({"prompt": "x", "stream": False}, {"prompt": '"stream": true', "stream": None}):
        assert (await rpc.relay(request(body))).status == 200


async def test_what_is_not_there_or_not_ready(rpc: Rpc) -> None:
    rpc.book.add("young", 1, state="bootstrapping")
    assert await refused(rpc.relay(request(instance_id="?"))) == (Code.NOT_FOUND, "Unknown instance_id: ?")
    not_ready = (Code.FAILED_PRECONDITION, "Instance young is not ready (state=bootstrapping)")
    assert await refused(rpc.relay(request(instance_id="young"))) == not_ready


async def test_a_server_that_ended_before_the_request_and_one_that_ended_with_it() -> None:
    async def script(asked: Asked) -> None:
        if asked.body.get("die"):
            asked.cut()
        elif asked.body.get("half"):
            asked.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n1234")
            asked.cut()
        else:
            await asked.answer({})

    async with serving() as rpc:
        async with scripted(script) as (_, address):
            rpc.book.add("gen", address)
            for body in ({"die": 1}, {"half": 1}):
                code, said = await refused(rpc.relay(request(body)))
                assert code is Code.ABORTED and said.startswith("Instance gen does not answer: ")
        code, said = await refused(rpc.relay(request()))
        assert code is Code.UNAVAILABLE and said.startswith("Instance gen does not answer: ")


async def test_a_server_that_ends_for_good_with_the_request_on_a_connection_that_was_kept() -> None:
    async def script(asked: Asked) -> None:
        if asked.body.get("die"):
            engine.listening.close()
            asked.cut()
        else:
            await asked.answer({})

    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add("gen", address)
        assert (await rpc.relay(request())).status == 200
        assert (await refused(rpc.relay(request({"die": 1}))))[0] is Code.ABORTED
        assert [asked.connection for asked in engine.asked] == [1, 1]


async def test_a_server_that_is_stopped_on_purpose_is_not_ready() -> None:
    async def script(asked: Asked) -> None:
        rpc.book.add("gen", address, state="stopping")
        asked.cut()

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        not_ready = (Code.FAILED_PRECONDITION, "Instance gen is not ready (state=stopping)")
        assert await refused(rpc.relay(request())) == not_ready


async def test_many_side_by_side_each_with_its_own_answer() -> None:
    reached = asyncio.Event()

    async def script(asked: Asked) -> None:
        if len(engine.asked) == 300:
            reached.set()
        await reached.wait()
        await asked.answer({"prompt": asked.body["prompt"]})

    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add("gen", address)
        answers = await asyncio.gather(*(rpc.relay(request({"prompt": f"p {n}"})) for n in range(300)))
        assert [json.loads(answer.body)["prompt"] for answer in answers] == [f"p {n}" for n in range(300)]


async def test_bodies_of_any_size(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.raw(asked.content)

    async with scripted(script, tmp_path / "s") as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        body = json.dumps({"prompt": "x" * 20_000_000}).encode()
        assert (await rpc.relay(request(body))).body == body


async def test_it_needs_the_key() -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({})

    async with scripted(script) as (engine, address), serving(access_key="key") as rpc:
        rpc.book.add("gen", address)
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            assert (await refused(rpc.relay(request(), metadata=metadata)))[0] is Code.UNAUTHENTICATED
        assert engine.asked == []
        answer = await rpc.relay(request(), metadata=(("authorization", "Bearer key"),))
        assert answer.status == 200 and engine.asked[0].headers.get("authorization") is None
