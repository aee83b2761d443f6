"""Callers that spend next to nothing on a call, the same by gRPC and by HTTP, so that what is measured is the servers.

A request is made once and sent as bytes; of an answer only its success is looked at, and the first one's length. Each
HTTP/1.1 caller has a connection; those of gRPC share one. Of HTTP/2 there is what one call after the other takes:
headers as literals, room for all answers from the start, and no trailer read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import cast

from bench.load import COMPLETE, COMPLETIONS, HOST, PROMPT, Client, Job, Tally
from bullpen.proto import bootstrap as pb

LENGTH = b"\r\ncontent-length:"


async def call(job: Job, tally: Tally) -> None:
    """Call until cancelled. Raises RuntimeError where the server refuses a call or closes a connection."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()
    if job.client == Client.MINIMAL_GRPC:
        request = pb.CompleteRequest(launch_id=job.name, prompts=[PROMPT], max_tokens=job.tokens).SerializeToString()
        calls = GrpcCalls(COMPLETE, request)
        await loop.create_connection(lambda: GrpcCallers(tally, failed, calls, job.callers), HOST, job.port)
    else:
        content = http_request(COMPLETIONS, json.dumps(job.body()).encode())
        for _ in range(job.callers):
            await loop.create_connection(lambda: HttpCaller(tally, failed, content), HOST, job.port)
    await failed


class Connection(asyncio.Protocol):
    """One connection of callers."""

    read_tokens: Callable[[bytes], int]
    """The tokens of an answer's completion."""

    def __init__(self, tally: Tally, failed: asyncio.Future[None]) -> None:
        self._tally = tally
        self._failed = failed
        self._tokens: int | None = None
        self.received = bytearray()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.fail(f"the server closed a connection ({exc})")

    def answered(self, body: bytearray) -> None:
        """An answer is there."""
        if self._tokens is None:
            self._tokens = type(self).read_tokens(bytes(body))
        self._tally.answered(self._tokens)

    def fail(self, why: str) -> None:
        """End everything."""
        if not self._failed.done():
            self._failed.set_exception(RuntimeError(why))


# -- HTTP/1.1 ----------------------------------------------------------------------------------------------------------


def http_request(path: str, body: bytes) -> bytes:
    """A request with a JSON body."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def http_tokens(body: bytes) -> int:
    """The tokens of the completion in an answer's body."""
    return int(json.loads(body)["usage"]["completion_tokens"])


class HttpCaller(Connection):
    """A caller of HTTP/1.1."""

    read_tokens = staticmethod(http_tokens)

    def __init__(self, tally: Tally, failed: asyncio.Future[None], request: bytes) -> None:
        super().__init__(tally, failed)
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to call."""
        super().connection_made(transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Call again where that was the end of an answer."""
        self.received += data
        try:
            body = http_answer(self.received)
        except ValueError as problem:
            self.fail(str(problem))
            return
        if body is not None:
            self.received.clear()
            self.answered(body)
            self.transport.write(self._request)


def http_answer(received: bytearray) -> bytearray | None:
    """The body of an answer; None where it is not all there. Raises ValueError where it is no success."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    place = head.find(LENGTH)
    if not head.startswith(b"http/1.1 200 ") or place < 0:
        raise ValueError(f"the server answers {received[:500].decode(errors='replace')}")
    size = int(head[place + len(LENGTH) :].partition(b"\r\n")[0])
    return received[end + 4 :] if len(received) >= end + 4 + size else None


# -- gRPC --------------------------------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
HEAD, PREFIX = 9, 5
"""Bytes before a frame's payload, and before gRPC's message in it."""
WINDOW, FIRST_WINDOW = 2**31 - 1, 65_535


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def message(content: bytes) -> bytes:
    """A message of gRPC, not compressed."""
    return b"\0" + len(content).to_bytes(4, "big") + content


def grpc_tokens(content: bytes) -> int:
    """The tokens of the completion in an answer's message."""
    return int(pb.CompleteResponse.FromString(content).completions[0].completion_tokens)


class GrpcCalls:
    """The bytes of calls with the same request, which differ in the number of their stream."""

    def __init__(self, path: str, request: bytes) -> None:
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": HOST,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        # Literals that the server need not remember (RFC 7541, 6.2.2).
        block = b"".join(
            b"\0" + b"".join(bytes((len(word),)) + word.encode() for word in field) for field in fields.items()
        )
        body = message(request)
        self._head = frame(HEADERS, END_HEADERS, 0, block)[: HEAD - 4]
        self._middle = block + frame(DATA, END_STREAM, 0, body)[: HEAD - 4]
        self._body = body

    def call(self, stream: int) -> bytes:
        """One of them."""
        number = stream.to_bytes(4, "big")
        return self._head + number + self._middle + number + self._body


class GrpcCallers(Connection):
    """Callers of gRPC, on one connection."""

    read_tokens = staticmethod(grpc_tokens)

    def __init__(self, tally: Tally, failed: asyncio.Future[None], calls: GrpcCalls, callers: int) -> None:
        super().__init__(tally, failed)
        self._calls = calls
        self._callers = callers
        self._stream = -1
        self._bodies: dict[int, bytearray] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to call, and leave the server all the room that there can be, so that no more is to be said of it."""
        super().connection_made(transport)
        room = INITIAL_WINDOW_SIZE.to_bytes(2, "big") + WINDOW.to_bytes(4, "big")
        more = frame(WINDOW_UPDATE, 0, 0, (WINDOW - FIRST_WINDOW).to_bytes(4, "big"))
        calls = b"".join(self._call() for _ in range(self._callers))
        self.transport.write(PREFACE + frame(SETTINGS, 0, 0, room) + more + calls)

    def data_received(self, data: bytes) -> None:
        """Read the frames that are all there; call again for each call that is answered."""
        received = self.received
        received += data
        replies = bytearray()
        start, there = 0, len(received)
        while there - start >= HEAD:
            end = start + HEAD + int.from_bytes(received[start : start + 3], "big")
            if there < end:
                break
            stream = int.from_bytes(received[start + 5 : start + HEAD], "big")
            replies += self._read(received[start + 3], received[start + 4], stream, received[start + HEAD : end])
            start = end
        del received[:start]
        if replies:
            self.transport.write(replies)

    def _read(self, kind: int, flags: int, stream: int, payload: bytearray) -> bytes:
        """What is to be sent for a frame."""
        if kind == DATA:
            self._bodies[stream] += payload
        if kind in (DATA, HEADERS) and flags & END_STREAM:
            body = self._bodies.pop(stream)[PREFIX:]
            if not body:
                self.fail("a call was refused")
                return b""
            self.answered(body)
            return self._call()
        if kind in (RST_STREAM, GOAWAY):
            self.fail(f"the server ends calls (frame {kind}: {bytes(payload)!r})")
        if kind in (SETTINGS, PING) and not flags & ACK:
            return frame(kind, ACK, 0, bytes(payload) if kind == PING else b"")
        return b""

    def _call(self) -> bytes:
        self._stream += 2
        self._bodies[self._stream] = bytearray()
        return self._calls.call(self._stream)
