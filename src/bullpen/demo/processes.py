"""Process trees as the demo shows them: who there is, what memory is whose, and whether anybody is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bullpen.node import trees

PAUSE = 0.05


@dataclass(frozen=True)
class Process:
    """A process and its memory, in bytes.

    Attributes:
        depth: how far below the first one of its tree.
        private: pages that no other process has.
        shared: pages that others have too: the zygote's, and files such as libraries.
        pss: ``private`` and, of each shared page, the part that falls to this process; sums are true.
    """

    pid: int
    depth: int
    title: str
    private: int
    shared: int
    pss: int


def read_tree(root: int) -> list[Process]:
    """A process and all below it, parents before children; those that end meanwhile are left out."""
    found: list[Process] = []
    with suppress(psutil.NoSuchProcess):
        _read_below(psutil.Process(root), 0, found)
    return found


def _read_below(process: psutil.Process, depth: int, found: list[Process]) -> None:
    try:
        memory = process.memory_full_info()
        title = title_of(process)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie counts as gone
        return
    found.append(Process(process.pid, depth, title, memory.uss, memory.rss - memory.uss, memory.pss))
    for child in sorted(process.children(), key=lambda child: child.create_time()):
        _read_below(child, depth + 1, found)


def is_below(root: int, title: str) -> bool:
    """Whether there is a process with a title that begins so, somewhere below another one."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title_of(process).startswith(title):
                    return True
    return False


def title_of(process: psutil.Process) -> str:
    """What a process calls itself: its title, or its command line without the program's folder."""
    program, *words = [word for word in process.cmdline() if word] or [process.name()]
    return " ".join([Path(program).name if program.startswith("/") else program, *words])


def total_pss(processes: Iterable[Process]) -> int:
    """The memory that processes take together, in bytes."""
    return sum(process.pss for process in processes)


def in_sessions(sessions: Collection[int | None]) -> list[trees.Process]:
    """The living processes of some sessions."""
    everyone = trees.read_processes().values()
    return [process for process in everyone if process.session in sessions and process.state not in "ZX"]


def kill_sessions(sessions: Collection[int | None], seconds: float) -> bool:
    """SIGKILL whoever is in some sessions until nobody is; return whether that came in time."""
    deadline = time.monotonic() + seconds
    while alive := in_sessions(sessions):
        if time.monotonic() > deadline:
            return False
        for process in alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(PAUSE)
    return True


def wait_until_gone(sessions: Collection[int | None], seconds: float) -> bool:
    """Wait for the end of every process of some sessions; return whether it came in time."""
    deadline = time.monotonic() + seconds
    while in_sessions(sessions):
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def leftovers(sessions: Collection[int | None], folder: Path) -> list[str]:
    """Who is left of a daemon's processes, by a scan of ``/proc``: anyone in a session that it or its children led, or
    with a file open below its folder."""
    inside = f"{folder.resolve()}/"
    return [
        f"{process.pid} ({process.name})"
        for process in trees.read_processes().values()
        if process.pid != os.getpid()
        and process.state not in "ZX"
        and (process.session in sessions or any(path.startswith(inside) for path in open_files(process.pid)))
    ]


def open_files(pid: int) -> Sequence[str]:
    """The paths that a process has open; none where it is gone or another user's."""
    paths = []
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                paths.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return paths


def sessions_of(processes: Iterable[Process]) -> set[int]:
    """The sessions that processes belong to."""
    sessions = set()
    for process in processes:
        with suppress(ProcessLookupError):
            sessions.add(os.getsid(process.pid))
    return sessions
