"""Process trees: who belongs to an instance, and killing until a scan finds nobody.

A process belongs to an instance if it is in the instance's cgroup, in the session that its server leads, descends from
one that does, or (where there are no cgroups) has the instance's log as its output. Each mark alone can be shed by a
stubborn program; all of them together hardly.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bullpen.node.cgroups import Cgroups

KILL_SECONDS = 10.0
"""How long processes get to end after SIGKILL before the tree counts as stuck."""
FIRST_PAUSE, LONGEST_PAUSE = 0.004, 0.25
SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True)
class Process:
    """A process as ``/proc`` shows it."""

    pid: int
    parent: int
    session: int
    start_ticks: int
    state: str
    name: str


@dataclass(frozen=True)
class Tree:
    """What identifies an instance's processes: the server's pid and start, the cgroup's key, the log."""

    key: str
    leader: int
    start_ticks: int
    log: Path


def read_process(pid: int) -> Process | None:
    """One process, or None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    name, _, rest = text.partition(b"(")[2].rpartition(b")")
    fields = rest.split()
    return Process(
        pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        state=fields[0].decode(),
        name=name.decode(errors="replace"),
    )


def read_processes() -> dict[int, Process]:
    """Every process on this host that this user can see."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return {process.pid: process for process in map(read_process, pids) if process is not None}


def members(tree: Tree, processes: dict[int, Process], in_cgroup: Iterable[int], by_log: bool) -> list[Process]:
    """The processes of a tree among those of a scan, zombies included."""
    found = {pid for pid in in_cgroup if pid in processes}
    leader = processes.get(tree.leader)
    # The kernel keeps a session's number from being a new pid while anyone is in it. So if a process has that pid but
    # another start time, the session is over and the number belongs to a stranger.
    if leader is None or leader.start_ticks == tree.start_ticks:
        found |= {process.pid for process in processes.values() if process.session == tree.leader}
    if by_log:
        found |= {pid for pid in processes if writes_to(pid, tree.log)}
    children = defaultdict(list)
    for process in processes.values():
        children[process.parent].append(process.pid)
    queue = list(found)
    while queue:
        for child in children[queue.pop()]:
            if child not in found:
                found.add(child)
                queue.append(child)
    found.discard(os.getpid())
    return [processes[pid] for pid in sorted(found)]


def writes_to(pid: int, log: Path) -> bool:
    """Whether a process has a log as its output or error output."""
    for descriptor in (1, 2):
        try:
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") == str(log):
                return True
        except OSError:
            return False
    return False


def shared_memory_of(pids: Iterable[int]) -> set[Path]:
    """Files in shared memory that any of the processes maps."""
    files = set()
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                _, found, name = line.rstrip("\n").partition(SHARED_MEMORY)
                if found and not name.endswith(" (deleted)"):
                    files.add(Path(SHARED_MEMORY + name))
    return files


class Scanner:
    """Scans of ``/proc``, outside the event loop; callers that ask at the same time share one."""

    def __init__(self) -> None:
        self._next: asyncio.Future[dict[int, Process]] | None = None
        self._busy = asyncio.Lock()

    async def scan(self) -> dict[int, Process]:
        """A scan that begins after this call."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> dict[int, Process]:
        async with self._busy:
            self._next = None  # whoever asks from here on needs a later scan
            return await asyncio.to_thread(read_processes)


class Trees:
    """Looks at trees, and ends them."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._scanner = Scanner()

    async def members(self, tree: Tree) -> list[Process]:
        """The tree's processes that are not zombies, found by a scan that begins now."""
        processes = await self._scanner.scan()
        found = members(tree, processes, self._cgroups.pids(tree.key), by_log=not self._cgroups.available)
        for process in found:
            if process.state == "Z" and process.parent == os.getpid() and process.pid != tree.leader:
                # An orphan of the tree that came to us, the subreaper. The server's own status is read elsewhere.
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
        return [process for process in found if process.state not in "ZX"]

    async def kill(self, tree: Tree, *, deadline: float = KILL_SECONDS) -> list[Process]:
        """SIGKILL the tree until a scan finds nobody; return who is left at the deadline.

        Shared memory that only this tree had mapped is removed with it.
        """
        end = time.monotonic() + deadline
        pause = FIRST_PAUSE
        shared: set[Path] = set()
        while True:
            alive = await self.members(tree)
            if not alive:
                remove_shared_memory(shared, tree)
                return []
            if time.monotonic() > end:
                return alive
            shared |= shared_memory_of(process.pid for process in alive)
            self._cgroups.kill(tree.key)
            for process in alive:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def remove_shared_memory(files: set[Path], tree: Tree) -> None:
    """Remove what a dead tree left in shared memory, but nothing that is older than the tree."""
    started = boot_time() + tree.start_ticks / os.sysconf("SC_CLK_TCK")
    for file in files:
        with suppress(OSError):
            if file.stat().st_ctime >= started - 1:
                file.unlink()


def boot_time() -> float:
    """When the kernel started, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
