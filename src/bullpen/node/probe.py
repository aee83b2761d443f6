"""Is a server ready? One GET, with a deadline, over TCP, TLS or a Unix socket."""

from __future__ import annotations

import asyncio

from bullpen.core.instance import Address
from bullpen.node.http import connect

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
    reader, writer = await connect(address, LONGEST_LINE)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: bullpen\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        return int(line.split()[1]) if line.startswith(b"HTTP/1.") and len(line.split()) > 1 else 0
    finally:
        writer.close()
