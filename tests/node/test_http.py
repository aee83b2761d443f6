"""One request to an instance: whole answers whatever their framing, and one kind of error for everything else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bullpen.core.instance import Address
from bullpen.node import http
from bullpen.node.http import Answer, NoAnswerError, ask
from tests.node.http_server import saying, serving, unsigned_certificate

SECONDS = 10.0


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",), Answer(200, b"ok")),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\no", b"k", b"ok"), Answer(200, b"okok")),
        (
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n"),
            Answer(200, b"abcde"),
        ),
        ((b"HTTP/1.0 404 Not Found\r\n\r\ngone",), Answer(404, b"gone")),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), Answer(204, b"")),
        (
            (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"),
            Answer(503, b""),
        ),
    ],
)
async def test_the_answer_is_read_whole(pieces: tuple[bytes, ...], expected: Answer) -> None:
    async with serving(saying(*pieces)) as address:
        assert await ask(address, "GET", "/", seconds=SECONDS) == expected


async def test_what_is_sent() -> None:
    seen: list[bytes] = []
    async with serving(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", into=seen)) as address:
        await ask(address, "GET", "/a?b=c", headers=[("X-Key", "clé")], seconds=SECONDS)
        await ask(address, "POST", "/sleep", seconds=SECONDS)
        await ask(address, "POST", "/rpc", body=b'{"a": 1}', seconds=SECONDS)
    get, post, rpc = seen
    assert get.startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert "X-Key: clé\r\n".encode() in get
    assert b"Connection: close\r\n" in get
    assert b"Content-Length: 0\r\n" in post
    assert b"Content-Type: application/json\r\n" in rpc
    assert rpc.endswith(b'\r\n\r\n{"a": 1}')


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "proper HTTP"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "proper HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "proper HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "proper HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n" + b"x" * 50, "more than 40 bytes"),
    ],
)
async def test_what_is_no_answer(said: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LONGEST_BODY", 40)
    async with serving(saying(said)) as address:
        with pytest.raises(NoAnswerError, match=words):
            await ask(address, "GET", "/", seconds=SECONDS)


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_a_server_that_hangs_is_left_at_the_deadline(first: bytes) -> None:
    ended = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        try:
            while await reader.read(1024):
                pass
        except ConnectionResetError:
            pass
        ended.set()
        writer.close()

    async with serving(hang) as address:
        with pytest.raises(NoAnswerError, match=r"not answered within 0\.1 s"):
            await ask(address, "GET", "/", seconds=0.1)
        await asyncio.wait_for(ended.wait(), SECONDS)


async def test_nobody_listens() -> None:
    async with serving(saying(b"")) as address:
        pass
    with pytest.raises(NoAnswerError, match="nobody listens"):
        await ask(address, "GET", "/", seconds=SECONDS)
    for nowhere in (Address("192.0.2.300", 1), Address("a" * 300, 1), Address("", None, uds="x" * 300)):
        with pytest.raises(NoAnswerError):
            await ask(nowhere, "GET", "/", seconds=SECONDS)


@pytest.mark.parametrize(("path", "key"), [("/", "hush\r\nX: y"), ("/a b", "hush"), ("/", "hush\ud800")])
async def test_what_cannot_be_sent_is_not_quoted(path: str, key: str) -> None:
    async with serving(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as address:
        with pytest.raises(NoAnswerError, match="cannot be sent") as caught:
            await ask(address, "GET", path, headers=[("Authorization", key)], seconds=SECONDS)
    assert "hush" not in str(caught.value)


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "http.sock")
    server = await asyncio.start_unix_server(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), path)
    assert await ask(Address("127.0.0.1", None, uds=path), "GET", "/", seconds=SECONDS) == Answer(200, b"ok")
    server.close()
    with pytest.raises(NoAnswerError):
        await ask(Address("127.0.0.1", None, uds=path), "GET", "/", seconds=SECONDS)


async def test_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    context = unsigned_certificate(tmp_path)
    async with serving(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), context) as address:
        assert await ask(address, "GET", "/", seconds=SECONDS) == Answer(200, b"ok")
