"""Logs: byte ranges, the cap on a reply, and the live follow."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.web.calls import INSTANCES

MIB = 1024 * 1024
LOG_BYTES = 3 * MIB


def read(daemon: Daemon, instance_id: str, wanted: str | None = None, **query: str) -> httpx.Response:
    headers = {} if wanted is None else {"Range": wanted}
    return daemon.http.get(f"{INSTANCES}/{instance_id}/log", headers=headers, params=query)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with an instance, `quiet`, whose log grows no more, and one, `long`, with more than a reply holds."""
    with Daemon(tmp_path_factory.mktemp("logs") / "state") as daemon:
        daemon.wait_ready().wait_warm()
        daemon.create(instance_id="quiet")
        daemon.create(instance_id="long", env_vars={"BULLPEN_SIM_LOG_BYTES": str(LOG_BYTES)})
        for name in ("quiet", "long"):
            daemon.wait_state(name, "ready")
        wait_until(lambda: b"GET /health" in read(daemon, "quiet").content)
        yield daemon


@pytest.fixture
def log(logs: Daemon) -> bytes:
    """The log of `quiet`."""
    return read(logs, "quiet").content


def test_whole(logs: Daemon) -> None:
    reply = read(logs, "quiet")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/octet-stream"
    assert "content-range" not in reply.headers
    assert b"this is a simulator" in reply.content


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-14", 0, 14),
        ("bytes=15-29", 15, 29),
        ("bytes=0-0", 0, 0),
        ("bytes=15-", 15, None),
        ("bytes=0-", 0, None),
        ("bytes=10-99999999", 10, None),
        ("bytes=10-" + "9" * 30, 10, None),
        ("Bytes=3-7", 3, 7),
        ("bytes=003-007", 3, 7),
    ],
)
def test_range(logs: Daemon, log: bytes, wanted: str, first: int, last: int | None) -> None:
    end = len(log) - 1 if last is None else last
    reply = read(logs, "quiet", wanted)
    assert reply.status_code == 206
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-range"] == f"bytes {first}-{end}/{len(log)}"
    assert reply.content == log[first : end + 1]


def test_last_byte(logs: Daemon, log: bytes) -> None:
    reply = read(logs, "quiet", f"bytes={len(log) - 1}-")
    assert (reply.status_code, reply.content) == (206, log[-1:])


@pytest.mark.parametrize(
    "wanted",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=-500",
        "bytes=a-b",
        "bytes=0x0-5",
        "bytes=5-4",
        "bytes=0-1,3-4",
        "bytes=0-1, 3-4",
        "bytes=0-,-5",
        "bytes=+1-4",
        "bytes=1 - 4",
        "bytes=1.0-4",
        "bytes 0-1",
        "lines=0-1",
        "0-1",
        "bytes=0-" + "9" * 5000,
        "bytes=0-1 bytes=2-3",
        "bytes=\u00b2-\u00b3",
    ],
)
def test_range_that_is_none(logs: Daemon, log: bytes, wanted: str) -> None:
    reply = logs.http.get(f"{INSTANCES}/quiet/log", headers=[(b"Range", wanted.encode("latin-1"))])
    assert reply.status_code == 400, reply.headers
    assert "bytes=A-B" in reply.json()["detail"]


@pytest.mark.parametrize("beyond", [0, 1, 10**9, 10**30])
@pytest.mark.parametrize("end", ["", "last"])
def test_start_past_the_end(logs: Daemon, log: bytes, beyond: int, end: str) -> None:
    start = len(log) + beyond
    reply = read(logs, "quiet", f"bytes={start}-{start + 5 if end else ''}")
    assert reply.status_code == 416
    assert reply.headers["content-range"] == f"bytes */{len(log)}"
    assert reply.content == b""


@pytest.mark.parametrize(
    "wanted", [None, "bytes=0-", "bytes=0-2097151", f"bytes=0-{LOG_BYTES}", "bytes=7-", "bytes=7-99999999"]
)
def test_one_mib_a_reply(logs: Daemon, wanted: str | None) -> None:
    reply = read(logs, "long", wanted)
    assert len(reply.content) == MIB
    if wanted is None:
        assert reply.status_code == 200
    else:
        first = int(wanted[len("bytes=") :].partition("-")[0])
        assert reply.status_code == 206
        sent, _, total = reply.headers["content-range"].removeprefix("bytes ").partition("/")
        assert sent == f"{first}-{first + MIB - 1}"
        assert int(total) > LOG_BYTES


def test_read_in_chunks_to_the_end(logs: Daemon) -> None:
    """As a client does that keeps its place."""
    pieces: list[bytes] = []
    while (reply := read(logs, "long", f"bytes={sum(map(len, pieces))}-")).status_code != 416:
        assert reply.status_code == 206
        pieces.append(reply.content)
    whole = b"".join(pieces)
    assert len(pieces) > LOG_BYTES // MIB
    assert reply.headers["content-range"] == f"bytes */{len(whole)}"
    assert b"Application startup complete" in whole


def test_empty(shared: Daemon) -> None:
    """A log is empty until the server has written its first line; a file emptied by hand looks the same."""
    shared.create(instance_id="empty")
    shared.wait_state("empty", "ready")
    (log,) = (path for path in (shared.state_dir / "logs").glob("*.log") if not path.name.startswith("zygote"))
    log.write_bytes(b"")
    reply = read(shared, "empty")
    assert (reply.status_code, reply.content) == (200, b"")
    for wanted in ("bytes=0-", "bytes=0-5", "bytes=3-"):
        reply = read(shared, "empty", wanted)
        assert reply.status_code == 416
        assert reply.headers["content-range"] == "bytes */0"
        assert reply.content == b""


def test_holds_what_every_process_of_the_tree_wrote(logs: Daemon, log: bytes) -> None:
    for writer in (b"(APIServer pid=", b"(EngineCore pid=", b"(Worker pid="):
        assert writer in log


def test_unknown_instance(shared: Daemon) -> None:
    for wanted in (None, "bytes=0-", "nonsense"):
        reply = read(shared, "none", wanted)
        assert reply.status_code == 404
        assert "'none'" in reply.json()["detail"]


def test_stays_after_the_end_and_goes_with_delete(shared: Daemon) -> None:
    shared.create(instance_id="one", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.1"})
    shared.wait_state("one", "failed")
    assert "ending with exit code 1" in read(shared, "one").text
    shared.delete("one")
    assert read(shared, "one").status_code == 404
    shared.create(instance_id="one")
    assert "ending with exit code 1" not in read(shared, "one").text, "an id that comes back has a log of its own"


def test_follow_to_the_end_of_the_server(shared: Daemon) -> None:
    shared.create(instance_id="one", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.5"})
    followed = read(shared, "one", follow="true").content
    assert shared.instance("one")["state"] == "failed", "the follow lasts as long as the server"
    assert followed == read(shared, "one").content
    assert b"ending with exit code 1" in followed


def test_follow_from_a_place(shared: Daemon) -> None:
    shared.create(instance_id="one", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.5"})
    wait_until(lambda: len(read(shared, "one").content) > 100)
    followed = read(shared, "one", "bytes=100-", follow="true").content
    assert followed == read(shared, "one").content[100:]


def test_follow_of_a_caller_that_leaves(logs: Daemon, log: bytes) -> None:
    address = urlsplit(logs.url)
    daemon = psutil.Process(logs.pid)
    before = daemon.num_fds()
    for _ in range(5):
        connection = http.client.HTTPConnection(str(address.hostname), address.port)
        connection.request("GET", f"{INSTANCES}/quiet/log?follow=1")
        assert connection.getresponse().read(len(log)) == log
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    wait_until(lambda: daemon.num_fds() <= before)
