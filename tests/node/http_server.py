"""A server of a few lines, for the tests of who asks instances by HTTP."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bullpen.core.instance import Address

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def saying(*pieces: bytes, into: list[bytes] | None = None) -> Handler:
    """A server that reads a request whole, then says pieces one after the other and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line.partition(b":")[2]) for line in head.splitlines() if line.lower().startswith(b"content-length")),
            0,
        )
        body = await reader.readexactly(length)
        if into is not None:
            into.append(head + body)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    return handle


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[Address]:
    """Run it on a free port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=tls)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1], tls=tls is not None)
    finally:
        server.close()


def unsigned_certificate(folder: Path) -> ssl.SSLContext:
    """A certificate that nobody has signed, for a host of another name."""
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs the openssl command")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=elsewhere -keyout key -out certificate"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context
