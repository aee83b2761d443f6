"""HTTP connections to the instances, kept open between requests.

Each instance has its own, and its own bound on how many, so that a slow one makes nobody else wait. A request that is
given up, by cancelling the task that waits for it, closes its connection: that is how an engine learns that nobody
wants the answer any more, and why no answer can ever reach the caller of another request.

A client of our own because most of the gRPC face's time beside gRPC itself is spent here: a call takes a quarter less
processor time in all than with aiohttp's, the fastest general one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import httptools

from bullpen.core.instance import Address

IDLE_SECONDS = 3.0
"""How long an idle connection is kept. Less than the 5 s after which vLLM's server closes it."""
CONNECT_SECONDS = 10.0
AHEAD_BYTES = 1024 * 1024
"""How much of an answer is read before its reader takes it."""


class Connection(asyncio.Protocol):
    """A connection, and the answer to the request that was sent on it last.

    Attributes:
        status: the answer's; 0 until its head is there.
        complete: whether the whole answer has been received.
        begun: whether any of it has.
    """

    def __init__(self) -> None:
        self.status = 0
        self.complete = True
        self.begun = False
        self.idle_since = 0.0
        self._kept = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Whether it leads to the server, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether it can carry another request: the answer has been received and taken to its last byte."""
        return self.open and self.complete and self._kept and not self._pieces

    def send(self, request: bytes) -> None:
        """Send a request on a connection that is new or `reusable`."""
        assert self._transport is not None
        self.status, self.complete, self.begun, self._kept = 0, False, False, False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    async def head(self) -> None:
        """Wait for the answer's head. Raises ConnectionError."""
        while not self.status:
            await self._more()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answer's body as it comes. Raises ConnectionError where it ends in the middle."""
        while True:
            if self._pieces:
                yield self._take()
            elif self.complete:
                return
            else:
                await self._more()

    async def body(self) -> bytes:
        """The answer's whole body. Raises ConnectionError."""
        if self.complete:  # as a rule it comes with the head
            return self._take()
        return b"".join([piece async for piece in self.pieces()])

    def _take(self) -> bytes:
        """What has come of the body."""
        piece = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting_bytes = 0
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()
        return piece

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        """Wait until more of the answer is there."""
        if not self.open:
            raise ConnectionResetError("the connection was closed before the answer ended")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """More of the answer came; something else than an answer closes the connection."""
        self.begun = True
        try:
            if self.complete or self._parser is None:
                raise httptools.HttpParserError("an answer that nobody asked for")
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()
        else:
            self._pause_when_ahead()
        self._wake()

    def _pause_when_ahead(self) -> None:
        if self._waiting_bytes > AHEAD_BYTES and self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._transport = None
        self._wake()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer begins; a second one is none that the next request may get."""
        if self.complete:
            raise ValueError("an answer that nobody asked for")

    def on_headers_complete(self) -> None:
        """The head is there; an interim one is none."""
        assert self._parser is not None
        code = self._parser.get_status_code()
        self.status = code if code >= 200 else 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body is there."""
        self._pieces.append(body)
        self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        """The answer is there."""
        if self.status:
            assert self._parser is not None
            self.complete = True
            self._kept = self._parser.should_keep_alive()


class Pool:
    """The connections to one address; belongs to one event loop.

    Args:
        address: where they lead.
        most: how many requests there may be at a time; further ones wait, in their order.
    """

    def __init__(self, address: Address, most: int) -> None:
        self._address = address
        self._places = asyncio.Semaphore(most)
        self._idle: deque[Connection] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._users = 0

    @property
    def unused(self) -> bool:
        """Whether nobody uses it, and no connection is open."""
        return not self._users and not self._idle

    async def answered(self, request: bytes) -> Connection:
        """Send a request; the connection on which the head of its answer has come, to be given to `put_back`.

        Raises:
            OSError: nobody listens there, or the connection was closed too early.
        """
        self._users += 1
        try:
            await self._places.acquire()
            try:
                return await self._asked(request)
            except BaseException:
                self._places.release()
                raise
        except BaseException:
            self._users -= 1
            raise

    def put_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close one whose answer was not read to its end."""
        self._users -= 1
        self._places.release()
        if not connection.reusable:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = loop.call_later(IDLE_SECONDS, self._close_idle)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().abort()
        if self._sweep is not None:
            self._sweep.cancel()

    async def _asked(self, request: bytes) -> Connection:
        """A connection on which a request was sent and answered."""
        lost: ConnectionError | None = None
        while self._idle:
            connection = self._idle.pop()
            if not connection.open:
                continue
            try:
                return await _ask(connection, request)
            except ConnectionError as problem:
                # The server closed it while the request was on its way; what it had begun to answer it has taken.
                if connection.begun:
                    raise
                lost = problem
                break
        try:
            connection = await self._connect()
        except OSError as problem:
            raise lost or problem from None  # where it has gone altogether, it went with the request
        return await _ask(connection, request)

    async def _connect(self) -> Connection:
        loop, address = asyncio.get_running_loop(), self._address
        tls = _any_certificate() if address.tls else None
        name = "" if tls else None
        async with asyncio.timeout(CONNECT_SECONDS):
            if address.uds is not None:
                made = await loop.create_unix_connection(Connection, address.uds, ssl=tls, server_hostname=name)
            else:
                host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address.host, address.host)
                port = address.port or 0
                made = await loop.create_connection(Connection, host, port, ssl=tls, server_hostname=name)
        return made[1]

    def _close_idle(self) -> None:
        """Close the connections that have been idle for long, and look again when the next one has."""
        loop = asyncio.get_running_loop()
        self._sweep = None
        while self._idle:
            due = self._idle[0].idle_since + IDLE_SECONDS
            if due > loop.time():
                self._sweep = loop.call_at(due, self._close_idle)
                return
            self._idle.popleft().abort()


async def _ask(connection: Connection, request: bytes) -> Connection:
    try:
        connection.send(request)
        await connection.head()
    except BaseException:
        connection.abort()
        raise
    return connection


def _any_certificate() -> ssl.SSLContext:
    """TLS without a check of names: the certificate is the instance's own and names some other host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
