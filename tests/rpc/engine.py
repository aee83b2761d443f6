"""A scripted OpenAI server, for what the simulator does not do: answers in any order, in any pieces, or cut off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bullpen.core.instance import Address

Json = dict[str, Any]


@dataclass
class Asked:
    """A request, and the way to answer it.

    Attributes:
        content: the body as it came.
        gone: set when its client has left before its answer ended.
    """

    path: str
    headers: dict[str, str]
    body: Json
    content: bytes
    connection: int
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, content: Json, status: int = 200, headers: str = "") -> None:
        """Answer as a whole."""
        await self.raw(json.dumps(content).encode(), status, headers)

    async def raw(self, body: bytes, status: int = 200, headers: str = "") -> None:
        """Answer with these bytes."""
        self.writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body)
        await self.writer.drain()

    async def begin(self) -> None:
        """Begin a stream."""
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        """Send a piece of a stream, which need not be a whole event."""
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.writer.drain()

    async def event(self, content: Json) -> None:
        """Send an event of a stream."""
        await self.chunk(b"data: %b\n\n" % json.dumps(content).encode())

    async def end(self) -> None:
        """End a stream."""
        await self.chunk(b"data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    def cut(self) -> None:
        """Close the connection in the middle."""
        self.writer.transport.abort()


class Engine:
    """Calls `script` for each request. `asked` are those that came, `connections` counts who connected.

    Once `listening` is closed, nobody can connect any more.
    """

    listening: asyncio.Server

    def __init__(self, script: Callable[[Asked], Awaitable[None]]) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests."""
        self.connections += 1
        number = self.connections
        self._writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                content = await reader.readexactly(int(headers["content-length"]))
                asked = Asked(lines[0].split()[1], headers, json.loads(content), content, number, writer)
                self.asked.append(asked)
                await self._answer(asked, reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._writers)

    def close(self) -> None:
        """Close every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader) -> None:
        """Run the script, unless the client leaves meanwhile."""
        script = asyncio.ensure_future(self.script(asked))
        while not script.done():
            await asyncio.wait({script}, timeout=0.005)
            if not script.done() and (reader.at_eof() or asked.writer.is_closing()):
                asked.gone.set()
                script.cancel()
                return
        if isinstance(script.exception(), ConnectionError):
            asked.gone.set()
        script.result()


@asynccontextmanager
async def scripted(
    script: Callable[[Asked], Awaitable[None]], uds: Path | None = None
) -> AsyncIterator[tuple[Engine, Address]]:
    """An engine that answers by a script, on a port or on a Unix socket."""
    engine = Engine(script)
    if uds is not None:
        server = await asyncio.start_unix_server(engine.serve, uds)
        address = Address("", None, str(uds))
    else:
        server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    engine.listening = server
    async with server:
        yield engine, address
        server.close()
        engine.close()


def piece(index: int, text: str, reason: str | None = None, counts: tuple[int, int] | None = None) -> Json:
    """An event of a stream of completions, as vLLM sends it."""
    usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1]} if counts else None
    return {"choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": reason}], "usage": usage}
