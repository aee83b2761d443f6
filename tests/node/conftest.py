"""Processes to look at and to end, for the tests of this folder."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from bullpen.node import cgroups as cgroups_module
from bullpen.node.cgroups import Cgroups
from bullpen.node.trees import Tree, read_process

T = TypeVar("T")
SECONDS = 20.0
PR_SET_CHILD_SUBREAPER = 36


def wait_for(probe: Callable[[], T | None], what: Callable[[], object] = str) -> T:
    """Call ``probe`` until it returns something true, and return that; ``what`` says more where it never does."""
    deadline = time.monotonic() + SECONDS
    while not (value := probe()):
        assert time.monotonic() < deadline, f"waited {SECONDS} s in vain: {what()}"
        time.sleep(0.005)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    process = read_process(pid)
    return process is not None and not process.is_dead


class Servers:
    """Starts programs as an instance's server would run: in a session of their own, with a log as output."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, code: str, *, session: bool = True) -> tuple[Tree, subprocess.Popen[bytes]]:
        """Run Python code; the tree is named by this process."""
        log = self._folder / f"log-{len(self._started)}"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", code], stdout=output, stderr=output, start_new_session=session
            )
        self._started.append(process)
        seen = read_process(process.pid)
        assert seen is not None
        return Tree(f"key{len(self._started)}", process.pid, seen.start_ticks, log), process

    def pids(self, tree: Tree, count: int) -> list[int]:
        """The numbers that the server has printed, once there are so many."""

        def whole() -> list[int] | None:
            found = [int(word) for word in tree.log.read_text().split() if word.isdecimal()]
            return found if len(found) >= count else None

        return wait_for(whole, tree.log.read_text)

    def end(self) -> None:
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait(SECONDS)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path)
    yield servers
    servers.end()


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Orphans come to this process, as they come to the daemon."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def no_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cgroups:
    """A host without cgroups."""
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    monkeypatch.setattr(cgroups_module, "MOUNTS", tmp_path / "mounts")
    cgroups = Cgroups("none")
    assert not cgroups.available
    return cgroups


@pytest.fixture
def real_cgroups() -> Iterator[Cgroups]:
    """This host's cgroups, where this user may make them."""
    cgroups = Cgroups(f"test-{os.getpid()}")
    if not cgroups.available:
        pytest.skip("this user may not make cgroups (v2) here")
    yield cgroups
    cgroups.close()
