"""One HTTP request to an instance, with a deadline, over TCP, TLS or a Unix socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from dataclasses import dataclass

import h11

from bullpen.core.instance import Address
from bullpen.errors import BullpenError

LONGEST_BODY = 4 * 1024 * 1024
"""Bytes of an answer; an embedding of 16,384 values takes a tenth of it."""
READ_BYTES = 64 * 1024


class NoAnswerError(BullpenError):
    """A server did not answer, or not as HTTP asks; the text is the second half of a sentence about the request."""


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    body: bytes


async def ask(
    address: Address,
    method: str,
    path: str,
    *,
    body: bytes | None = None,
    headers: Iterable[tuple[str, str]] = (),
    seconds: float,
) -> Answer:
    """Send a request on a connection of its own and wait for the whole answer; ``body`` is JSON.

    Raises:
        NoAnswerError: nobody listens, the answer is not there after ``seconds``, or one of both is no HTTP.
    """
    try:
        request = _request(method, path, body, headers)
    except (h11.LocalProtocolError, UnicodeError):
        # Without the problem's own words: they may quote a key.
        raise NoAnswerError("cannot be sent: its path or a header holds what HTTP does not allow there") from None
    try:
        async with asyncio.timeout(seconds):
            return await _exchange(address, request, body)
    except TimeoutError:
        raise NoAnswerError(f"was not answered within {seconds:.3g} s") from None
    except ConnectionRefusedError as problem:
        raise NoAnswerError("was not answered: nobody listens there") from problem
    except (OSError, UnicodeError) as problem:
        raise NoAnswerError(f"was not answered: {getattr(problem, 'strerror', None) or problem}") from problem
    except h11.RemoteProtocolError as problem:
        raise NoAnswerError(f"was not answered with proper HTTP: {problem}") from problem


async def connect(address: Address, limit: int = READ_BYTES) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an instance; ``limit`` is the longest line in bytes that the reader will read.

    Raises:
        OSError: nobody listens there, or not with TLS where that is expected.
    """
    tls = None
    if address.tls:
        # The certificate is the instance's own and names some other host: what is asked is whether it lives.
        # Hence no default context either: it reads every authority from disk, some 20 ms at each connection.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    if address.uds is not None:
        return await asyncio.open_unix_connection(
            address.uds, limit=limit, ssl=tls, server_hostname="" if tls else None
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address.host, address.host)
    return await asyncio.open_connection(host, address.port, limit=limit, ssl=tls)


def _request(method: str, path: str, body: bytes | None, headers: Iterable[tuple[str, str]]) -> h11.Request:
    own: list[tuple[str, str]] = [("Host", "bullpen"), ("Connection", "close"), *headers]
    if body is not None:
        own += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    elif method != "GET":
        own.append(("Content-Length", "0"))
    packed = [(name.encode(), value.encode()) for name, value in own]
    return h11.Request(method=method, target=path.encode(), headers=packed)


async def _exchange(address: Address, request: h11.Request, body: bytes | None) -> Answer:
    connection = h11.Connection(h11.CLIENT)
    message = connection.send(request) or b""
    message += connection.send(h11.Data(data=body or b"")) or b""
    message += connection.send(h11.EndOfMessage()) or b""
    reader, writer = await connect(address)
    try:
        writer.write(message)
        return await _answer(connection, reader)
    finally:
        # The answer is read or given up: nothing is left to be sent, and the server need not wait for us.
        writer.transport.abort()


async def _answer(connection: h11.Connection, reader: asyncio.StreamReader) -> Answer:
    status, body = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > LONGEST_BODY:
                raise NoAnswerError(f"was answered with more than {LONGEST_BODY} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return Answer(status, bytes(body))
