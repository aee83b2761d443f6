"""Callers that ask a server for completions, each again as soon as it is answered.

``python -m bench.callers`` reads a `Job` as JSON from standard input and prints what came of it, a `Done`. It is a
process of its own and spends next to nothing on a call, the same with both protocols, so that what is measured is the
servers: a request is made once and sent as bytes, and of an answer only its success is looked at. The callers share
one connection where the protocol lets them, as they do in a gRPC client; with HTTP/1.1 each has its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

HOST = "127.0.0.1"
LENGTH = b"\r\ncontent-length:"
WARM_SECONDS = 0.3
"""What callers do in this time after their first request is not counted."""


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        protocol: ``http`` or ``grpc``.
        port: of the server, on this host.
        path: what is asked for.
        request: the body of a request in base64; with gRPC the message.
        callers: how many there are.
        seconds: for how long they call.
    """

    protocol: str
    port: int
    path: str
    request: str
    callers: int
    seconds: float


@dataclass(frozen=True)
class Done:
    """What callers did.

    Attributes:
        warming: calls answered before the time.
        calls: calls answered in the time.
        seconds: the time.
        cpu_seconds: what this process computed in the time.
        first: the first answer's body in base64; with gRPC the message.
    """

    warming: int
    calls: int
    seconds: float
    cpu_seconds: float
    first: str


class Tally:
    """Counts answers, until something goes wrong or the time is over."""

    def __init__(self) -> None:
        self.calls = 0
        self.first: bytes | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, body: bytearray) -> None:
        """An answer is there."""
        self.calls += 1
        if self.first is None:
            self.first = bytes(body)

    def fail(self, why: str) -> None:
        """End everything."""
        if not self.ended.done():
            self.ended.set_exception(RuntimeError(why))

    def end(self) -> None:
        """The time is over."""
        if not self.ended.done():
            self.ended.set_result(None)


class Connection(asyncio.Protocol):
    """One connection of callers."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.received = bytearray()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.tally.fail(f"the server closed a connection ({exc})")


class HttpCaller(Connection):
    """A caller of HTTP/1.1."""

    def __init__(self, tally: Tally, path: str, body: bytes) -> None:
        super().__init__(tally)
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

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
            self.tally.fail(str(problem))
            return
        if body is not None:
            self.received.clear()
            self.tally.answered(body)
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


# -- HTTP/2, as much of it as one call after the other takes -----------------------------------------------------------

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


def header_block(path: str) -> bytes:
    """The headers of a gRPC call, as literals that the server need not remember (RFC 7541, 6.2.2)."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": HOST,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    words = ((name.encode(), value.encode()) for name, value in fields.items())
    return b"".join(b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in words)


def message(content: bytes) -> bytes:
    """A message of gRPC, not compressed."""
    return b"\0" + len(content).to_bytes(4, "big") + content


class GrpcCallers(Connection):
    """Callers of gRPC, on one connection."""

    def __init__(self, tally: Tally, path: str, content: bytes, callers: int) -> None:
        super().__init__(tally)
        block, body = header_block(path), message(content)
        self._callers = callers
        # A call is these three, with the number of its stream twice between them.
        self._pieces = (
            frame(HEADERS, END_HEADERS, 0, block)[:5],
            block + frame(DATA, END_STREAM, 0, body)[:5],
            body,
        )
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
                self.tally.fail("a call was refused")
                return b""
            self.tally.answered(body)
            return self._call()
        if kind in (RST_STREAM, GOAWAY):
            self.tally.fail(f"the server ends calls (frame {kind}: {bytes(payload)!r})")
        if kind in (SETTINGS, PING) and not flags & ACK:
            return frame(kind, ACK, 0, bytes(payload) if kind == PING else b"")
        return b""

    def _call(self) -> bytes:
        self._stream += 2
        self._bodies[self._stream] = bytearray()
        head, middle, body = self._pieces
        stream = self._stream.to_bytes(4, "big")
        return head + stream + middle + stream + body


async def run(job: Job) -> Done:
    """Let the callers call."""
    loop = asyncio.get_running_loop()
    tally = Tally()
    content = base64.b64decode(job.request)
    if job.protocol == "grpc":
        await loop.create_connection(lambda: GrpcCallers(tally, job.path, content, job.callers), HOST, job.port)
    else:
        for _ in range(job.callers):
            await loop.create_connection(lambda: HttpCaller(tally, job.path, content), HOST, job.port)
    await asyncio.wait([tally.ended], timeout=WARM_SECONDS)
    warming, begun, cpu = tally.calls, time.monotonic(), time.process_time()
    loop.call_later(job.seconds, tally.end)
    await tally.ended
    seconds, computed = time.monotonic() - begun, time.process_time() - cpu
    first = base64.b64encode(tally.first or b"").decode()
    return Done(warming, tally.calls - warming, seconds, computed, first)


def main() -> None:
    """Do what standard input says, and print what came of it."""
    job = Job(**json.load(sys.stdin))
    print(json.dumps(asdict(uvloop.run(run(job)))))


if __name__ == "__main__":
    main()
