"""A small HTTP/1.1 server: keep-alive, bodies with a length or in chunks, answers whole or streamed, limits on input.

A handler is called for each request and gives the answer as an asynchronous context, which ends when the answer has
been sent. When the client goes away before that, the handler is cancelled.
"""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlsplit

from bullpen.sim.log import Log

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256
MAX_BODY_BYTES = 32 * 1024 * 1024
KEEP_ALIVE_SECONDS = 5.0

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LINGER_SECONDS = 1.0


@dataclass(frozen=True)
class Request:
    """One request; header names are in lower case, `path` is decoded, `query` holds every value of a name.

    `client` is the client's address, None where it came through a Unix socket.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    client: str | None


@dataclass(frozen=True)
class Response:
    """A whole answer."""

    status: int
    body: bytes = b""
    content_type: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """An answer (status 200) whose pieces are sent as they come."""

    pieces: AsyncGenerator[bytes, None]
    content_type: str


Handler = Callable[[Request], contextlib.AbstractAsyncContextManager[Response | Stream]]


class HttpServer:
    """Serves one listening socket; all methods belong to the event loop's thread."""

    def __init__(self, handler: Handler, log: Log) -> None:
        self.handler = handler
        self.log = log
        self.closing = False
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, bound: socket.socket) -> None:
        """Begin to listen on a bound socket. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), sock=bound, backlog=2048)

    async def close(self, grace: float) -> None:
        """Accept nothing any more, give requests under way `grace` seconds to end, then drop every connection."""
        self.closing = True
        if self._server:
            self._server.close()
        for connection in self.connections:
            connection.close_if_idle()
        if tasks := [connection.task for connection in self.connections if connection.task]:
            await asyncio.wait(tasks, timeout=grace)
        for connection in list(self.connections):
            connection.abort()


class _ProtocolError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class _Head:
    method: str
    target: str
    version: str
    headers: dict[str, str]

    @property
    def keep_alive(self) -> bool:
        return self.version == "HTTP/1.1" and "close" not in self.headers.get("connection", "").lower()


class _Connection(asyncio.StreamReaderProtocol):
    """One client's connection; its task reads requests and answers them one after the other."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        super().__init__(self._reader)
        self._idle = True
        self._answered = False
        self._client = "-"
        self._address: str | None = None
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._writer = asyncio.StreamWriter(transport, self, self._reader, loop)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._client, self._address = f"{peer[0]}:{peer[1]}", peer[0]
        self._server.connections.add(self)
        self.task = loop.create_task(self._serve())

    def eof_received(self) -> bool:
        super().eof_received()
        return False  # as uvicorn: a client that has finished sending does not wait for an answer

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.connections.discard(self)
        if self.task:
            self.task.cancel()

    def close_if_idle(self) -> None:
        if self._idle:
            self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def _serve(self) -> None:
        try:
            while await self._exchange():
                pass
        except OSError:
            pass  # the client has gone
        finally:
            self._writer.close()

    async def _exchange(self) -> bool:
        """Answer one request; says whether the connection can carry another."""
        try:
            head = await self._read_head()
            if head is None:
                return False
            request = _request(head, await self._read_body(head), self._address)
        except _ProtocolError as error:
            await self._refuse(error)
            return False
        async with contextlib.AsyncExitStack() as context:
            answer: Response | Stream
            try:
                answer = await context.enter_async_context(self._server.handler(request))
            except Exception as error:
                self._server.log.traceback(error)
                answer = Response(500, b"Internal Server Error", "text/plain; charset=utf-8")
            keep_alive = await self._answer(request, answer, head)
        self._idle = self._answered = True
        return keep_alive and not self._server.closing

    async def _answer(self, request: Request, answer: Response | Stream, head: _Head) -> bool:
        """Send an answer; says whether the connection can go on."""
        keep_alive = head.keep_alive and not self._server.closing
        status = answer.status if isinstance(answer, Response) else 200
        line = f"{request.method} {head.target} {head.version}"
        self._server.log.plain(f'INFO:     {self._client} - "{line}" {status} {_phrase(status)}')
        if isinstance(answer, Stream):
            return await self._send_stream(answer, head, keep_alive)
        await self._send(answer, keep_alive, with_body=request.method != "HEAD")
        return keep_alive

    async def _read_head(self) -> _Head | None:
        """The next request's head, None when the client sends no more or is idle for too long."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS if self._answered else None):
                data = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, TimeoutError):
            return None
        except asyncio.LimitOverrunError:
            raise _ProtocolError(431, "The request's headers are too large.") from None
        self._idle = False
        return _parse_head(data)

    async def _read_body(self, head: _Head) -> bytes:
        length = head.headers.get("content-length")
        encoding = head.headers.get("transfer-encoding")
        if encoding is None and length is None:
            return b""
        if encoding is not None and (length is not None or encoding.lower() != "chunked"):
            raise _ProtocolError(400, "Invalid HTTP request received.")
        if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
            raise _ProtocolError(400, "Invalid HTTP request received.")
        if length is not None and int(length) > MAX_BODY_BYTES:
            raise _ProtocolError(413, f"The request's body is larger than {MAX_BODY_BYTES} bytes.")
        if head.headers.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            return await (self._read_chunks() if length is None else self._reader.readexactly(int(length)))
        except asyncio.IncompleteReadError:
            raise ConnectionResetError from None
        except asyncio.LimitOverrunError:
            raise _ProtocolError(400, "Invalid HTTP request received.") from None

    async def _read_chunks(self) -> bytes:
        body = bytearray()
        while True:
            size_line = (await self._reader.readuntil(b"\r\n"))[:-2].partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size_line):
                raise _ProtocolError(400, "Invalid HTTP request received.")
            size = int(size_line, 16)
            if len(body) + size > MAX_BODY_BYTES:
                raise _ProtocolError(413, f"The request's body is larger than {MAX_BODY_BYTES} bytes.")
            if size == 0:
                break
            body += await self._reader.readexactly(size)
            if await self._reader.readexactly(2) != b"\r\n":
                raise _ProtocolError(400, "Invalid HTTP request received.")
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return bytes(body)

    async def _send(self, response: Response, keep_alive: bool, with_body: bool = True) -> None:
        headers = {"content-length": str(len(response.body)), **response.headers}
        self._send_head(response.status, response.content_type, headers, keep_alive)
        if with_body:
            self._writer.write(response.body)
        await self._writer.drain()

    async def _send_stream(self, stream: Stream, head: _Head, keep_alive: bool) -> bool:
        """Send a stream, in chunks where the client's HTTP knows them; says whether the connection can go on."""
        chunked = head.version == "HTTP/1.1"
        self._send_head(200, stream.content_type, {"transfer-encoding": "chunked"} if chunked else {}, keep_alive)
        async with contextlib.aclosing(stream.pieces) as pieces:
            async for piece in pieces:
                self._writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                await self._writer.drain()
        if chunked:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        return keep_alive and chunked

    def _send_head(self, status: int, content_type: str, headers: dict[str, str], keep_alive: bool) -> None:
        lines = [
            f"HTTP/1.1 {status} {_phrase(status)}",
            time.strftime("date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "server: bullpen-sim",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if content_type:
            lines.append(f"content-type: {content_type}")
        if not keep_alive:
            lines.append("connection: close")
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace"))

    async def _refuse(self, error: _ProtocolError) -> None:
        """Answer a request that cannot be read, then let what is still coming run out, lest a reset eat the answer."""
        self._server.log.plain(f"WARNING:  {error.message}")
        await self._send(Response(error.status, error.message.encode(), "text/plain; charset=utf-8"), keep_alive=False)
        self._writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while await self._reader.read(MAX_HEAD_BYTES):
                    pass


def _parse_head(data: bytes) -> _Head:
    """Read a request line and its headers. Raises _ProtocolError."""
    first, *lines = data[:-4].decode("latin-1").lstrip("\r\n").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or parts[2] not in {"HTTP/1.1", "HTTP/1.0"}:
        raise _ProtocolError(400, "Invalid HTTP request received.")
    if not parts[1].startswith(("/", "http://", "https://")) or not parts[1].isprintable():
        raise _ProtocolError(400, "Invalid HTTP request received.")
    if len(lines) > MAX_HEADERS:
        raise _ProtocolError(431, "The request has too many headers.")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        single = name in {"content-length", "transfer-encoding"}
        if not colon or not _TOKEN.fullmatch(name) or (single and headers.get(name, value) != value):
            raise _ProtocolError(400, "Invalid HTTP request received.")
        headers[name] = value if single or name not in headers else f"{headers[name]}, {value}"
    return _Head(parts[0], parts[1], parts[2], headers)


def _request(head: _Head, body: bytes, client: str | None) -> Request:
    target = head.target
    if not target.startswith("/"):
        try:
            target = urlsplit(target)._replace(scheme="", netloc="").geturl() or "/"
        except ValueError:
            raise _ProtocolError(400, "Invalid HTTP request received.") from None
    path, _, query = target.partition("#")[0].partition("?")
    try:
        values = parse_qs(query, keep_blank_values=True)
    except ValueError:
        raise _ProtocolError(400, "Invalid HTTP request received.") from None
    return Request(head.method, unquote(path), values, head.headers, body, client)


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase
