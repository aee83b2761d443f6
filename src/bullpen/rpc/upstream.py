"""Requests to the instances' own OpenAI servers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from bullpen.core.instance import Address
from bullpen.errors import BullpenError
from bullpen.rpc.connections import Connection, Pool
from bullpen.rpc.ports import Served

Json = dict[str, Any]

MOST_CONNECTIONS = 512
"""To one instance; further requests wait for one of them, in their order. vLLM computes at most 1024 at a time."""


class RefusedError(BullpenError):
    """A server answered with an error; the text is its sentence.

    Attributes:
        status: its HTTP status, or the one that an error in the middle of a stream would have had.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LostError(BullpenError):
    """A server does not answer, or stopped in the middle of an answer."""


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
        async with self._answer(served, path, body) as answer:
            return _object(await answer.body())

    async def stream(self, served: Served, path: str, body: Json) -> AsyncGenerator[Json, None]:
        """The events of a streamed answer as they come.

        Raises:
            RefusedError: the server answered with an error, at once or in the middle.
            LostError: it did not answer, or not to the end.
        """
        ended = False
        async with self._answer(served, path, body) as answer:
            left = b""
            # Read to the end of the answer, beyond the last event: only then can the connection be used again.
            async for piece in answer.pieces():
                *lines, left = (left + piece).split(b"\n")
                for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
                    if data == b"[DONE]":
                        ended = True
                    elif not ended:
                        yield _event(data)
        if not ended:
            raise LostError("the answer ended in the middle")

    def close(self) -> None:
        """Close every connection that no request is using; those in use close with their request."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    @asynccontextmanager
    async def _answer(self, served: Served, path: str, body: Json) -> AsyncIterator[Connection]:
        """The answer's head, which says that it is no error."""
        if served.address is None:
            raise LostError("it has no address yet")
        try:
            async with self._pool(served.address).answered(_request(served, path, body)) as answer:
                if answer.status >= 400:
                    raise _refusal(answer.status, await answer.body())
                yield answer
        except TimeoutError as problem:
            raise LostError("it does not take connections") from problem
        except OSError as problem:
            raise LostError(problem.strerror or str(problem)) from problem

    def _pool(self, address: Address) -> Pool:
        pool = self._pools.get(address)
        if pool is None:
            for other in [other for other, pool in self._pools.items() if pool.unused]:
                del self._pools[other]
            pool = self._pools[address] = Pool(address, self._most)
        return pool


def _request(served: Served, path: str, body: Json) -> bytes:
    content = json.dumps(body, separators=(",", ":")).encode()
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
        content = json.loads(data)
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
