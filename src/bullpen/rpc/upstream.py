"""Requests to the instances' own OpenAI servers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any

from bullpen.core.instance import Address
from bullpen.errors import BullpenError
from bullpen.rpc.connections import Connection, Pool
from bullpen.rpc.ports import Served

Json = dict[str, Any]

MOST_CONNECTIONS = 512
"""To one instance; further requests wait for one of them, in their order. vLLM computes at most 1024 at a time."""


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


class Upstream:
    """The connections to all instances; belongs to one event loop.

    Args:
        most_connections: to one instance.
    """

    def __init__(self, most_connections: int = MOST_CONNECTIONS) -> None:
        self._most = most_connections
        self._pools: dict[Address, Pool] = {}

    async def ask(self, served: Served, path: str, body: Json) -> Json:
        """The whole JSON answer to a request.

        Raises:
            RefusedError: the server answered with an error.
            LostError: it did not answer.
        """
        with _Lost():
            pool = self._pool(served)
            answer = await pool.answered(_request(served, path, body))
            try:
                return _object(await (await _accepted(answer)).body())
            finally:
                pool.put_back(answer)

    async def relay(self, served: Served, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to a request, whatever they are.

        Raises:
            LostError: there is no answer.
        """
        with _Lost():
            pool = self._pool(served)
            answer = await pool.answered(_request(served, path, body))
            try:
                return answer.status, await answer.body()
            finally:
                pool.put_back(answer)

    async def stream(self, served: Served, path: str, body: Json) -> AsyncGenerator[Json, None]:
        """The events of a streamed answer as they come.

        Raises:
            RefusedError: the server answered with an error, at once or in the middle.
            LostError: it did not answer, or not to the end.
        """
        ended = False
        with _Lost():
            pool = self._pool(served)
            answer = await pool.answered(_request(served, path, body))
            try:
                left = b""
                # Read to the end of the answer, beyond the last event: only then can the connection be used again.
                async for piece in (await _accepted(answer)).pieces():
                    *lines, left = (left + piece).split(b"\n")
                    for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
                        if data == b"[DONE]":
                            ended = True
                        elif not ended:
                            yield _event(data)
            finally:
                pool.put_back(answer)
        if not ended:
            raise LostError("the answer ended in the middle")

    def close(self) -> None:
        """Close every connection that no request is using; those in use close with their request."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

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


class _Lost:
    """A context that says of what goes wrong on a connection that the server is lost."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(problem, TimeoutError):
            raise LostError("it does not take connections") from problem
        if isinstance(problem, OSError):
            was_sent = isinstance(problem, ConnectionResetError)
            raise LostError(problem.strerror or str(problem), was_sent=was_sent) from problem


async def _accepted(answer: Connection) -> Connection:
    """An answer that is no error."""
    if answer.status >= 400:
        raise _refusal(answer.status, await answer.body())
    return answer


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
