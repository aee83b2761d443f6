"""Requests to the instances' own OpenAI servers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any

from bullpen.core.instance import Address
from bullpen.errors import BullpenError
from bullpen.rpc.connections import CONNECT_SECONDS, Connection, Pool
from bullpen.rpc.ports import Served
from bullpen.rpc.turns import LARGE, Turns

Json = dict[str, Any]

MOST_CONNECTIONS = 512
"""To one instance; further requests wait for one of them, in their order. vLLM computes at most 1024 at a time."""
EVENTS_TOGETHER = 64
"""Of a stream, read in one step."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


class RefusedError(BullpenError):
    """A server answered with an error; the text is its sentence.

    Attributes:
        status: its HTTP status, or the one that an error in the middle of a stream would have had.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LostError(BullpenError):
    """A server does not answer, or stopped in the middle of an answer.

    Attributes:
        was_sent: whether it was lost while it had the request, rather than before.
    """

    def __init__(self, message: str, *, was_sent: bool = False) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class NoConnectionError(LostError):
    """A server took no connection in time: it hangs, or has more to do than it can."""


class Upstream:
    """The connections to all instances; belongs to one event loop.

    Args:
        most_connections: to one instance.

    Attributes:
        turns: those of whatever takes long in that loop.
    """

    def __init__(self, most_connections: int = MOST_CONNECTIONS) -> None:
        self.turns = Turns()
        self._most = most_connections
        self._pools: dict[Address, Pool] = {}

    async def ask(self, served: Served, path: str, body: Json) -> Json:
        """The whole JSON answer to a request.

        Raises:
            RefusedError: the server answered with an error.
            LostError: it did not answer.
        """
        async with self._exchange(served, path, body) as answer:
            status, content = answer.status, await answer.body()
        if len(content) > LARGE:
            await self.turns.take()
        if status >= 400:
            raise _refusal(status, content)
        return _object(content)

    async def relay(self, served: Served, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to a request, whatever they are.

        Raises:
            LostError: there is no answer.
        """
        async with self._exchange(served, path, body) as answer:
            return answer.status, await answer.body()

    async def stream(self, served: Served, path: str, body: Json) -> AsyncGenerator[Json, None]:
        """The events of a streamed answer as they come.

        Raises:
            RefusedError: the server answered with an error, at once or in the middle.
            LostError: it did not answer, or not to the end.
        """
        ended = False
        async with self._exchange(served, path, body) as answer:
            if answer.status >= 400:
                raise _refusal(answer.status, await answer.body())
            left = b""
            # Read to the end of the answer, beyond the last event: only then can the connection be used again.
            async for piece in answer.pieces():
                *lines, left = (left + piece).split(b"\n")
                events = [line[5:].strip() for line in lines if line.startswith(b"data:")]
                for place, data in enumerate(events, 1):
                    if data == b"[DONE]":
                        ended = True
                    elif not ended:
                        yield _event(data)
                    if place % EVENTS_TOGETHER == 0:
                        await self.turns.take()
        if not ended:
            raise LostError("the answer ended in the middle")

    def close(self) -> None:
        """Close every connection that no request is using; those in use close with their request."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _exchange(self, served: Served, path: str, body: Json | bytes) -> _Exchange:
        return _Exchange(self._pool(served), _request(served, path, body))

    def _pool(self, served: Served) -> Pool:
        address = served.address
        if address is None:
            raise LostError("it has no address yet")
        pool = self._pools.get(address)
        if pool is None:
            for other in [other for other, pool in self._pools.items() if pool.unused]:
                del self._pools[other]
            pool = self._pools[address] = Pool(address, self._most)
        return pool


class _Exchange:
    """A context that sends a request, gives the connection on which its answer comes, and gives that back at the end.

    What goes wrong on the connection is the loss of the server.
    """

    def __init__(self, pool: Pool, request: bytes) -> None:
        self._pool = pool
        self._request = request

    async def __aenter__(self) -> Connection:
        try:
            self._answer = await self._pool.answered(self._request)
        except OSError as problem:
            raise _loss(problem) from problem
        return self._answer

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.put_back(self._answer)
        if isinstance(problem, OSError):
            raise _loss(problem) from problem


def _loss(problem: OSError) -> LostError:
    if isinstance(problem, TimeoutError):
        return NoConnectionError(f"it took no connection within {CONNECT_SECONDS:g} s")
    return LostError(problem.strerror or str(problem), was_sent=isinstance(problem, ConnectionResetError))


def _request(served: Served, path: str, body: Json | bytes) -> bytes:
    content = body if isinstance(body, bytes) else _encode(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if served.api_key is not None:
        head += f"Authorization: Bearer {served.api_key}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _event(data: bytes) -> Json:
    event = _object(data)
    if "error" in event:
        raise _refusal(500, event)
    return event


def _object(data: bytes) -> Json:
    try:
        content = json.loads(data.decode())
    except ValueError as problem:
        raise LostError("the answer is no JSON") from problem
    if not isinstance(content, dict):
        raise LostError("the answer is no JSON object")
    return content


def _refusal(status: int, answer: bytes | Mapping[str, Any]) -> RefusedError:
    """The error that an answer stands for, in any of the shapes that servers use."""
    content: Any = answer
    text = f"HTTP status {status}"
    if isinstance(answer, bytes):
        text = answer.decode(errors="replace") or text
        try:
            content = json.loads(answer)
        except ValueError:
            return RefusedError(status, text)
    if isinstance(content, Mapping):
        error = content.get("error", content.get("detail", text))
        if isinstance(error, Mapping):
            code = error.get("code")
            return RefusedError(code if isinstance(code, int) and code >= 400 else status, str(error.get("message")))
        text = str(error)
    return RefusedError(status, text)
