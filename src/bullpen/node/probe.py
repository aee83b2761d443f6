"""Is a server ready? One GET, with a deadline, over TCP, TLS or a Unix socket."""

from __future__ import annotations

import asyncio
import ssl

from bullpen.core.instance import Address

PROBE_SECONDS = 2.0
LONGEST_LINE = 4096
"""Bytes; a longer status line is no HTTP server's."""


async def answers(address: Address, path: str) -> bool:
    """Whether a GET of ``path`` is answered with 200 in time."""
    try:
        return await asyncio.wait_for(_status(address, path), PROBE_SECONDS) == 200
    except (OSError, TimeoutError, ValueError):
        return False


async def _status(address: Address, path: str) -> int:
    reader, writer = await _connect(address)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: bullpen\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        return int(line.split()[1]) if line.startswith(b"HTTP/1.") and len(line.split()) > 1 else 0
    finally:
        writer.close()


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = None
    if address.tls:
        # The certificate is the instance's own and names some other host: what is asked is whether it lives.
        # Hence no default context either: it reads every authority from disk, some 20 ms at each probe.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    if address.uds is not None:
        return await asyncio.open_unix_connection(
            address.uds, limit=LONGEST_LINE, ssl=tls, server_hostname="" if tls else None
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address.host, address.host)
    return await asyncio.open_connection(host, address.port, limit=LONGEST_LINE, ssl=tls)
