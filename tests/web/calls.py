"""Ways to talk to a daemon that more than one file of these tests needs."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import psutil

from tests.support.daemon import Daemon, wait_until

INSTANCES = "/v2/vllm/instances"
REPLY_SECONDS = 20.0
STOP_SECONDS = 1.0
"""What the shared daemon gives an instance between SIGTERM and SIGKILL."""


def raw(
    daemon: Daemon, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Send a request with its path exactly as given; return status and body."""
    address = urlsplit(daemon.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=REPLY_SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def problems(reply: httpx.Response) -> list[dict[str, Any]]:
    """What a 422 says; each problem has type, place and sentence, and nothing else."""
    assert reply.status_code == 422, (reply.status_code, reply.text)
    detail = reply.json()["detail"]
    assert detail
    assert all(set(problem) == {"type", "loc", "msg"} and problem["msg"] for problem in detail), detail
    return list(detail)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and that its parent has not asked about does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_child(pid: int) -> psutil.Process:
    """The engine child of a server process, as soon as there is one."""
    wait_until(lambda: bool(psutil.Process(pid).children()))
    return psutil.Process(pid).children()[0]


def unused_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Watch:
    """An open watch, read by a thread of its own."""

    def __init__(self, reply: http.client.HTTPResponse) -> None:
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reply = reply
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(http.client.HTTPException, OSError, ValueError):
            for line in self._reply:
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def next(self, seconds: float = REPLY_SECONDS) -> dict[str, Any]:
        """The next line; it must come in time."""
        line = self._lines.get(timeout=seconds)
        assert line is not None, "the watch has ended"
        return line

    def until(self, kind: str, seconds: float = REPLY_SECONDS) -> list[dict[str, Any]]:
        """The next lines, up to and including the first of that type."""
        deadline = time.monotonic() + seconds
        lines = [self.next(seconds)]
        while lines[-1]["type"] != kind:
            lines.append(self.next(max(0.0, deadline - time.monotonic())))
        return lines

    def wait_end(self, seconds: float = REPLY_SECONDS) -> None:
        """Wait until the daemon ends the watch; lines that come before are skipped."""
        deadline = time.monotonic() + seconds
        while self._lines.get(timeout=max(0.0, deadline - time.monotonic())) is not None:
            pass


@contextmanager
def watching(daemon: Daemon, **query: Any) -> Iterator[Watch]:
    """Open a watch."""
    address = urlsplit(daemon.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port)
    connection.connect()
    assert connection.sock is not None
    connected = connection.sock
    connection.request("GET", f"{INSTANCES}/watch?{urlencode(query)}")
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    assert reply.headers["Content-Type"] == "application/x-ndjson"
    watch = Watch(reply)
    try:
        yield watch
    finally:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)  # wakes the reader, which a close does not
        watch.reader.join(REPLY_SECONDS)
        connection.close()
