"""Zygotes as real processes, and what can be seen of the processes that they give."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bullpen.zygote import boot, protocol
from bullpen.zygote.client import Process, ZygoteClient

T = TypeVar("T")
SECONDS = 20.0
SCRIPTED = Path(__file__).with_name("scripted.py")


class RunningZygote:
    """A zygote in a folder of its own, and a client of it.

    Args:
        folder: where its socket and its output go.
        *arguments: of its command line.
        program: what to run; the simulator's zygote by default.
        python: in which interpreter.
        environment: variables on top of this process's.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        program: Path | None = None,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.chmod(0o700)
        self.path = folder / "zygote.sock"
        self.output = folder / "zygote.log"
        command = [str(boot.__file__), "--engine", "sim"] if program is None else [str(program)]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [python, *command, "--socket", str(self.path), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._clients: list[ZygoteClient] = []
        self.pidfds: list[int] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self) -> ZygoteClient:
        """A new client, as soon as the zygote listens."""

        def try_once() -> ZygoteClient | None:
            assert self.process.poll() is None, self.output.read_text()
            try:
                return ZygoteClient(self.path)
            except OSError:
                return None

        client = wait_for(try_once)
        client.socket.settimeout(SECONDS)
        self._clients.append(client)
        return client

    def lease(self, client: ZygoteClient | None = None) -> Process:
        """A process, which ends with the test."""
        process = (client or self.connect()).lease()
        process.channel.settimeout(SECONDS)
        self.pidfds.append(process.pidfd)
        return process

    def run(self, code: str, log: Path, process: Process | None = None, **start: Any) -> Process:
        """Turn a process into a server that runs ``code`` and writes to ``log``."""
        process = process or self.lease()
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            process.start([code], start.pop("env", {}), descriptor, **start)
        finally:
            os.close(descriptor)
        return process

    def __enter__(self) -> RunningZygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pidfd in self.pidfds:
            kill(pidfd)
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)


def kill(pidfd: int, *, wait: bool = False) -> None:
    """End a process and close its pidfd; see it gone before where told so."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if wait:
        wait_end(pidfd)
    os.close(pidfd)


def wait_for(probe: Callable[[], T | None], seconds: float = SECONDS) -> T:
    """Call ``probe`` until it returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.005)
    return value


def wait_end(pidfd: int, seconds: float = SECONDS) -> None:
    """Wait for the end of a process."""
    assert select.select([pidfd], [], [], seconds)[0], f"it still lives after {seconds} s"


def next_event(client: ZygoteClient, kind: str) -> protocol.Message:
    """The next event of a kind that the zygote tells a client; others are passed over."""
    while True:
        received = protocol.receive(client.socket)
        assert received is not None, f"the zygote ended before it told of {kind!r}"
        if received[0].get("event") == kind:
            return received[0]


def lines(log: Path, count: int = 1) -> list[str]:
    """The lines of a log, once there are so many."""

    def whole() -> list[str] | None:
        found = log.read_text().splitlines() if log.exists() else []
        return found if len(found) >= count else None

    return wait_for(whole)


def open_descriptors(pid: int) -> dict[int, str]:
    """What a process has open."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def children_of(pid: int) -> set[int]:
    """The children of a process that are no zombies."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(parent) == pid and state not in "ZX":
            found.add(int(entry.name))
    return found
