"""The probe: yes only for a 200 in time; everything else is no, and nothing is an error."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import pytest

from bullpen.core.instance import Address
from bullpen.node import probe
from tests.node.http_server import saying, serving, unsigned_certificate


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 200\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False),
        (b"HTTP/1.1 two hundred\r\n\r\n", False),
        (b"HTTP/1.1\r\n\r\n", False),
        (b"200\r\n", False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"\xff" * 100_000, False),
        (b"", False),
    ],
)
async def test_answers(reply: bytes, expected: bool) -> None:
    async with serving(saying(reply)) as address:
        assert await probe.answers(address, "/health") is expected


async def test_what_is_asked() -> None:
    seen: list[bytes] = []
    async with serving(saying(b"HTTP/1.1 200 OK\r\n\r\n", into=seen)) as address:
        await probe.answers(address, "/health")
    assert seen[0].startswith(b"GET /health HTTP/1.1\r\nHost: ")
    assert b"Connection: close\r\n" in seen[0]


async def test_nobody_listens() -> None:
    async with serving(saying(b"")) as address:
        pass
    assert not await probe.answers(address, "/health")
    assert not await probe.answers(Address("192.0.2.300", 1), "/")
    assert not await probe.answers(Address("a" * 300, 1), "/")


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 20"])
async def test_a_server_that_hangs_is_left_at_the_deadline(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.1)
    ended = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await reader.read()  # to the end of the connection
        ended.set()
        writer.close()

    async with serving(hang) as address:
        begun = time.monotonic()
        assert not await asyncio.wait_for(probe.answers(address, "/health"), 10)
        assert time.monotonic() - begun >= 0.1
        await asyncio.wait_for(ended.wait(), 10)


async def test_tls_on_one_side_alone(certificate: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.1)
    handler = saying(b"HTTP/1.1 200 OK\r\n\r\n")
    async with serving(handler, certificate) as address:
        assert not await probe.answers(Address(address.host, address.port), "/health")
    async with serving(handler) as address:
        assert not await probe.answers(Address(address.host, address.port, tls=True), "/health")


@pytest.mark.parametrize("every", ["0.0.0.0", ""])
async def test_a_server_on_every_address_is_asked_on_loopback(every: str) -> None:
    async with serving(saying(b"HTTP/1.1 200 OK\r\n\r\n")) as address:
        assert await probe.answers(Address(every, address.port), "/health")


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "http.sock")
    server = await asyncio.start_unix_server(saying(b"HTTP/1.1 200 OK\r\n\r\n"), path)
    assert await probe.answers(Address("127.0.0.1", None, uds=path), "/health")
    server.close()
    assert not await probe.answers(Address("127.0.0.1", None, uds=path), "/health")
    assert not await probe.answers(Address("127.0.0.1", None, uds="x" * 300), "/health")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return unsigned_certificate(tmp_path_factory.mktemp("tls"))


async def test_tls_with_a_certificate_of_its_own(certificate: ssl.SSLContext, tmp_path: Path) -> None:
    handler = saying(b"HTTP/1.1 200 OK\r\n\r\n")
    async with serving(handler, certificate) as address:
        assert await probe.answers(address, "/health")
    path = str(tmp_path / "http.sock")
    server = await asyncio.start_unix_server(handler, path, ssl=certificate)
    assert await probe.answers(Address("127.0.0.1", None, uds=path, tls=True), "/health")
    server.close()
