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
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bullpen.node import shared_memory
from bullpen.node.cgroups import Cgroups

KILL_SECONDS = 10.0
"""How long processes get to end after SIGKILL before the tree counts as stuck."""
FIRST_PAUSE, LONGEST_PAUSE = 0.004, 0.25


@dataclass(frozen=True)
class Process:
    """A process as ``/proc`` shows it; ``outputs`` are the files behind its descriptors 1 and 2."""

    pid: int
    parent: int
    session: int
    start_ticks: int
    state: str
    name: str
    group: int = 0
    threads: int = 1
    outputs: frozenset[str] = frozenset()

    @property
    def is_dead(self) -> bool:
        """Whether nothing of it runs. Where only the main thread has ended, the process looks like a zombie and is
        none."""
        return self.state in "ZX" and self.threads <= 1

    def is_same(self, other: Process | None) -> bool:
        """Whether the other one is this process, now or earlier, and no later one of the same number."""
        return other is not None and (other.pid, other.start_ticks) == (self.pid, self.start_ticks)


@dataclass(frozen=True)
class Tree:
    """What identifies an instance's processes: the server's pid and start, the cgroup's key, the log."""

    key: str
    leader: int
    start_ticks: int
    log: Path


def read_process(pid: int) -> Process | None:
    """One process, or None where it is gone or hidden from this user.

    Raises:
        OSError: it cannot be told, for want of file descriptors, say.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
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
        group=int(fields[2]),
        threads=int(fields[17]),
        outputs=read_outputs(pid),
    )


def read_outputs(pid: int) -> frozenset[str]:
    """The files that a process has as output and error output, removed ones by the name that they had."""
    paths = set()
    for descriptor in (1, 2):
        with suppress(OSError):
            paths.add(os.readlink(f"/proc/{pid}/fd/{descriptor}").removesuffix(" (deleted)"))
    return frozenset(paths)


def read_processes() -> dict[int, Process]:
    """Every process on this host that this user can see.

    Raises:
        OSError: they cannot be listed.
    """
    # The newest first: one that forks and ends all the time is gone a moment after it was listed.
    pids = sorted((int(name) for name in os.listdir("/proc") if name.isdecimal()), reverse=True)
    return {process.pid: process for process in map(read_process, pids) if process is not None}


class Scan:
    """All processes at one moment, indexed by the marks of a tree."""

    def __init__(self, processes: dict[int, Process]) -> None:
        self.processes = processes
        self.children: dict[int, list[int]] = defaultdict(list)
        self.sessions: dict[int, list[int]] = defaultdict(list)
        self.groups: dict[int, list[int]] = defaultdict(list)
        self.writers: dict[str, list[int]] = defaultdict(list)
        for process in processes.values():
            self.children[process.parent].append(process.pid)
            self.sessions[process.session].append(process.pid)
            self.groups[process.group].append(process.pid)
            for output in process.outputs:
                self.writers[output].append(process.pid)


def members(tree: Tree, scan: Scan, in_cgroup: Iterable[int], by_log: bool) -> list[Process]:
    """The processes of a tree among those of a scan, zombies included."""
    found = {pid for pid in in_cgroup if pid in scan.processes}
    leader = scan.processes.get(tree.leader)
    # The kernel keeps a session's number from being a new pid while anyone is in it. So if a process has that pid but
    # another start time, the session is over and the number belongs to a stranger.
    if leader is None or leader.start_ticks == tree.start_ticks:
        found.update(scan.sessions.get(tree.leader, ()))
    if by_log:
        found.update(scan.writers.get(str(tree.log), ()))
    found.discard(os.getpid())
    queue = list(found)
    while queue:
        for child in scan.children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    found.discard(os.getpid())
    return [scan.processes[pid] for pid in sorted(found)]


def may_hide(tree: Tree, scan: Scan, before: Scan | None) -> bool:
    """Whether somebody of the group that the server led may live although a scan shows nobody alive.

    Processes that fork and end faster than a scan can look at them are seen by none; but the kernel knows the group,
    and the zombies that they leave in it change from scan to scan.
    """
    try:
        os.killpg(tree.leader, 0)
    except (ProcessLookupError, PermissionError):
        return False
    dead = scan.groups.get(tree.leader)
    return not dead or before is None or dead != before.groups.get(tree.leader)


def own_groups(pids: Collection[int], scan: Scan) -> list[int]:
    """The process groups that have members among ``pids`` and none besides."""
    groups = {scan.processes[pid].group for pid in pids} - {0, os.getpgrp()}
    return sorted(
        group for group in groups if all(pid in pids or scan.processes[pid].is_dead for pid in scan.groups[group])
    )


class Scanner:
    """Scans of ``/proc``, outside the event loop; callers that ask at the same time share one."""

    def __init__(self) -> None:
        self._next: asyncio.Future[Scan] | None = None
        self._busy = asyncio.Lock()

    async def scan(self) -> Scan:
        """A scan that begins after this call.

        Raises:
            OSError: the processes cannot be listed.
        """
        if self._next is None:
            self._next = asyncio.ensure_future(self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> Scan:
        async with self._busy:
            self._next = None  # whoever asks from here on needs a later scan
            return await asyncio.to_thread(lambda: Scan(read_processes()))


class Trees:
    """Looks at trees, and ends them."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._scanner = Scanner()

    async def members(self, tree: Tree) -> list[Process]:
        """The tree's processes that are alive, found by a scan that begins now.

        Raises:
            OSError: the processes cannot be listed.
        """
        return self._living(tree, await self._scanner.scan())

    def _living(self, tree: Tree, scan: Scan, known: Mapping[int, Process] = MappingProxyType({})) -> list[Process]:
        """The living ones, those included that were known before and have shed every mark since."""
        same = [pid for pid, process in known.items() if process.is_same(scan.processes.get(pid))]
        in_cgroup = self._cgroups.pids(tree.key)
        found = members(tree, scan, [*same, *in_cgroup], by_log=not self._cgroups.available)
        for process in found:
            if process.is_dead and process.parent == os.getpid() and process.pid != tree.leader:
                reap(process.pid)  # an orphan of the tree; the server's own status is read elsewhere
        return [process for process in found if not process.is_dead]

    async def shared_memory(self, tree: Tree) -> set[Path]:
        """The files in shared memory that the tree maps now; nothing where its processes cannot be listed."""
        try:
            alive = await self.members(tree)
        except OSError:
            return set()
        return await asyncio.to_thread(shared_memory.mapped_by, [process.pid for process in alive])

    async def kill(self, tree: Tree, *, deadline: float = KILL_SECONDS, shared: Collection[Path] = ()) -> list[Process]:
        """SIGKILL the tree until a scan finds nobody; return who is left at the deadline.

        Args:
            tree: which one.
            deadline: seconds.
            shared: files in shared memory that it was seen to map. Those, and what it maps now, are removed with it
                where nobody else maps them.

        Raises:
            OSError: the processes cannot be listed, up to the deadline.
        """
        end = time.monotonic() + deadline
        pause = FIRST_PAUSE
        files = set(shared)
        seen: dict[int, Process] = {}
        latest: Scan | None = None
        while True:
            try:
                scan = await self._scanner.scan()
                alive = self._living(tree, scan, seen)
            except OSError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(LONGEST_PAUSE)
                continue
            before, latest = latest, scan
            if not alive and may_hide(tree, scan, before):
                if time.monotonic() > end:
                    return [Process(tree.leader, 0, tree.leader, tree.start_ticks, "?", "seen by no scan")]
                await asyncio.sleep(FIRST_PAUSE)
                continue
            if not alive:
                if files:
                    await asyncio.to_thread(shared_memory.remove_leftovers, files, tree.start_ticks)
                return []
            if time.monotonic() > end:
                return alive
            pids = {process.pid for process in alive}
            # One that forks faster than we scan is caught with its group, which the kernel kills at one stroke.
            groups = own_groups(pids, scan) if seen else []
            new = pids - seen.keys()
            files |= await asyncio.to_thread(shared_memory.mapped_by, new)
            await asyncio.to_thread(self._kill_once, tree, alive, groups)
            await asyncio.sleep(pause)
            pause = FIRST_PAUSE if new and seen else min(pause * 2, LONGEST_PAUSE)
            seen |= {process.pid: process for process in alive}

    def _kill_once(self, tree: Tree, alive: list[Process], groups: list[int]) -> None:
        self._cgroups.kill(tree.key)
        for group in groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for process in alive:
            kill_process(process)

    def reap_orphans(self, ours: Collection[int]) -> None:
        """Read the end of processes that came to this one as their subreaper, so that they do not stay as zombies.

        Only for a process that has no children but ``ours`` and those of its own session, which are left alone.
        """
        own_session = os.getsid(0)
        for pid in children():
            process = None if pid in ours else read_process(pid)
            if process is not None and process.is_dead and process.session != own_session:
                reap(pid)


def children() -> list[int]:
    """The children of this process, of all its threads."""
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread may have ended
            found += map(int, (thread / "children").read_text().split())
    return found


def kill_process(process: Process) -> None:
    """SIGKILL this very process, not one that has its pid by now."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return  # it is gone; or no descriptor is left, and the next round tries again
    try:
        if process.is_same(read_process(process.pid)):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(pidfd)


def reap(pid: int) -> None:
    """Read the end of a child that is a zombie; nothing happens where it is none."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
