"""The callers of ``grpc``: what they make of answers that are whole, in pieces, or no success."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from bench.callers import DATA, END_STREAM, HEADERS, GrpcCallers, Job, Tally, frame, header_block, http_answer, run

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


async def called(number: int) -> tuple[Tally, Wire, Any]:
    tally, wire = Tally(), Wire()
    connection: Any = GrpcCallers(tally, PATH, b"request", number)
    connection.connection_made(wire)
    return tally, wire, connection


def answer(stream: int, text: bytes) -> bytes:
    data = frame(DATA, 0, stream, b"\0" + len(text).to_bytes(4, "big") + text)
    return frame(HEADERS, 4, stream, b"\x88") + data + frame(HEADERS, 4 | END_STREAM, stream, b"trailers")


async def test_each_answered_call_is_followed_by_one_on_a_new_stream() -> None:
    tally, wire, connection = await called(2)
    assert wire.written.count(b"request") == 2
    for byte in answer(3, b"second") + answer(1, b"first"):
        connection.data_received(bytes([byte]))
    assert (tally.calls, tally.first) == (2, b"second")
    assert wire.written.count(b"request") == 4
    assert frame(HEADERS, 4, 7, header_block(PATH)) in wire.written


async def test_a_call_that_ends_without_a_message_ends_the_run() -> None:
    tally, wire, connection = await called(1)
    connection.data_received(frame(HEADERS, 4 | END_STREAM, 1, b"status 5"))
    with pytest.raises(RuntimeError, match="refused"):
        await tally.ended
    assert wire.written.count(b"request") == 1


async def test_a_ping_is_answered_and_an_answer_to_one_is_not() -> None:
    _, wire, connection = await called(1)
    before = len(wire.written)
    connection.data_received(frame(6, 0, 0, b"12345678") + frame(6, 1, 0, b"87654321"))
    assert wire.written[before:] == frame(6, 1, 0, b"12345678")


@asynccontextmanager
async def grpc_server(status: grpc.StatusCode | None = None) -> AsyncIterator[int]:
    """A true gRPC server that says what it is asked, or ends every call with a status."""

    async def method(request: bytes, context: Any) -> bytes:
        if status is not None:
            await context.abort(status, "no")
        return b"heard " + request

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Method": grpc.unary_unary_rpc_method_handler(method)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def job(port: int) -> Job:
    return Job("grpc", port, PATH, base64.b64encode(b"this").decode(), callers=8, seconds=0.2)


async def test_a_true_server_understands_them() -> None:
    async with grpc_server() as port:
        done = await run(job(port))
    assert base64.b64decode(done.first) == b"heard this"
    assert done.warming >= 8
    assert done.calls > 8


async def test_a_true_refusal_ends_the_run() -> None:
    async with grpc_server(grpc.StatusCode.NOT_FOUND) as port:
        with pytest.raises(RuntimeError, match="refused"):
            await run(job(port))
