"""The callers of ``grpc``: what they make of answers that are whole, in pieces, or no success; and each real client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from bench.callers import run
from bench.load import COMPLETIONS, Client, Job, Tally
from bench.minimal_callers import DATA, END_STREAM, HEADERS, GrpcCallers, GrpcCalls, frame, http_answer
from bullpen.proto import bootstrap as pb
from tests.node.http_server import saying, serving

HEAD = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 4\r\n\r\n"
PATH = "/a.Service/Method"


def test_an_answer_is_there_when_its_last_byte_is() -> None:
    whole = HEAD + b"body"
    for size in range(len(whole)):
        assert http_answer(bytearray(whole[:size])) is None
    assert http_answer(bytearray(whole)) == bytearray(b"body")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_what_is_no_success_or_has_no_length_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError, match="the server answers HTTP"):
        http_answer(bytearray(answer))


class Wire:
    """A transport that remembers what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


def completion(tokens: int) -> bytes:
    return pb.CompleteResponse(completions=[pb.Completion(text="x", completion_tokens=tokens)]).SerializeToString()


async def called(number: int) -> tuple[Tally, asyncio.Future[None], Wire, Any]:
    tally, wire, failed = Tally(), Wire(), asyncio.get_running_loop().create_future()
    connection: Any = GrpcCallers(tally, failed, GrpcCalls(PATH, b"request"), number)
    connection.connection_made(wire)
    return tally, failed, wire, connection


def answer(stream: int, text: bytes) -> bytes:
    data = frame(DATA, 0, stream, b"\0" + len(text).to_bytes(4, "big") + text)
    return frame(HEADERS, 4, stream, b"\x88") + data + frame(HEADERS, 4 | END_STREAM, stream, b"trailers")


async def test_each_answered_call_is_followed_by_one_on_a_new_stream() -> None:
    tally, _, wire, connection = await called(2)
    assert wire.written.count(b"request") == 2
    for byte in answer(3, completion(7)) + answer(1, completion(8)):
        connection.data_received(bytes([byte]))
    assert (tally.calls, tally.tokens) == (2, 7)
    assert wire.written.count(b"request") == 4
    assert wire.written.endswith(GrpcCalls(PATH, b"request").call(7))


async def test_a_call_that_ends_without_a_message_ends_the_run() -> None:
    _, failed, wire, connection = await called(1)
    connection.data_received(frame(HEADERS, 4 | END_STREAM, 1, b"status 5"))
    with pytest.raises(RuntimeError, match="refused"):
        await failed
    assert wire.written.count(b"request") == 1


async def test_a_ping_is_answered_and_an_answer_to_one_is_not() -> None:
    _, _, wire, connection = await called(1)
    before = len(wire.written)
    connection.data_received(frame(6, 0, 0, b"12345678") + frame(6, 1, 0, b"87654321"))
    assert wire.written[before:] == frame(6, 1, 0, b"12345678")


@asynccontextmanager
async def grpc_server(status: grpc.StatusCode | None = None) -> AsyncIterator[int]:
    """A true gRPC server that completes, or ends every call with a status."""

    async def method(request: bytes, context: Any) -> bytes:
        if status is not None:
            await context.abort(status, "no")
        asked = pb.CompleteRequest.FromString(request)
        return completion(asked.max_tokens if asked.launch_id == "one" else -1)

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Complete": grpc.unary_unary_rpc_method_handler(method)}
    service = "vllm_bootstrap.InferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def job(client: Client, port: int) -> Job:
    return Job(client, port, "one", tokens=9, callers=8, seconds=0.2)


@pytest.mark.parametrize("client", [Client.MINIMAL_GRPC, Client.GRPC_AIO])
async def test_a_true_server_understands_them(client: Client) -> None:
    async with grpc_server() as port:
        done = await run(job(client, port))
    assert done.tokens == 9
    assert done.warming >= 8
    assert done.calls > 8


@pytest.mark.parametrize("client", [Client.MINIMAL_GRPC, Client.GRPC_AIO])
async def test_a_true_refusal_ends_the_run(client: Client) -> None:
    async with grpc_server(grpc.StatusCode.NOT_FOUND) as port:
        with pytest.raises((RuntimeError, ExceptionGroup)):
            await run(job(client, port))


@pytest.mark.parametrize("client", [Client.AIOHTTP, Client.HTTPX])
async def test_clients_of_http_ask_for_a_completion(client: Client) -> None:
    seen: list[bytes] = []
    body = json.dumps({"usage": {"completion_tokens": 9}}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: "
    async with serving(saying(head + str(len(body)).encode() + b"\r\n\r\n" + body, into=seen)) as address:
        done = await run(job(client, address.port or 0))
    assert done.tokens == 9
    assert done.calls > 0
    assert seen[0].startswith(f"POST {COMPLETIONS} HTTP/1.1".encode())
    assert json.loads(seen[0].partition(b"\r\n\r\n")[2])["max_tokens"] == 9
