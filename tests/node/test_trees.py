"""Process trees: who belongs to one by which mark, and that all of them are gone when they are said to be gone."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bullpen.node import trees as trees_module
from bullpen.node.cgroups import Cgroups
from bullpen.node.trees import (
    Process,
    Scan,
    Scanner,
    Tree,
    Trees,
    kill_process,
    members,
    own_groups,
    read_process,
    read_processes,
)
from tests.node.conftest import SECONDS, Servers, is_alive, wait_for

LEADER, LOG = 100, Path("/logs/a.log")
TREE = Tree("key", LEADER, 5000, LOG)


def process(
    pid: int,
    parent: int = 1,
    session: int = 1,
    *,
    ticks: int = 6000,
    state: str = "S",
    group: int = 0,
    output: str = "/elsewhere",
    threads: int = 1,
) -> Process:
    return Process(pid, parent, session, ticks, state, "name", group, threads, frozenset({output}))


def found(*processes: Process, in_cgroup: tuple[int, ...] = (), by_log: bool = True) -> list[int]:
    scan = Scan({one.pid: one for one in processes})
    return [one.pid for one in members(TREE, scan, in_cgroup, by_log)]


# -- who belongs to a tree ---------------------------------------------------------------------------------------------


def test_the_session_belongs_to_the_tree() -> None:
    leader = process(LEADER, session=LEADER, ticks=5000)
    assert found(leader, process(101, session=LEADER), process(102, session=7)) == [100, 101]


def test_the_session_does_so_without_its_leader() -> None:
    assert found(process(101, session=LEADER), process(102, session=7)) == [101]


def test_a_stranger_with_the_leaders_number_is_none_of_ours() -> None:
    stranger = process(LEADER, session=LEADER, ticks=9999)
    assert found(stranger, process(101, session=LEADER), process(102, parent=LEADER)) == []


def test_descendants_belong_to_the_tree_in_whatever_session() -> None:
    leader = process(LEADER, session=LEADER, ticks=5000)
    child, grandchild = process(101, parent=LEADER, session=101), process(102, parent=101, session=102)
    assert found(leader, child, grandchild, process(103, parent=1)) == [100, 101, 102]


def test_whoever_writes_to_the_log_belongs_to_the_tree() -> None:
    writer, its_child = process(200, output=str(LOG)), process(201, parent=200, session=201)
    assert found(writer, its_child, process(202)) == [200, 201]
    assert found(writer, its_child, by_log=False) == []


def test_whoever_is_in_the_cgroup_belongs_to_the_tree() -> None:
    assert found(process(300), process(301, parent=300), process(302), in_cgroup=(300, 999)) == [300, 301]


def test_zombies_are_listed_and_told_apart() -> None:
    leader = process(LEADER, session=LEADER, ticks=5000, state="Z")
    assert found(leader) == [100]
    assert leader.is_dead
    assert not process(1, state="D").is_dead
    assert not process(1, state="Z", threads=2).is_dead, "its main thread has ended, the others run"


def test_the_daemon_and_its_other_children_never_belong_to_one() -> None:
    own = process(os.getpid(), session=LEADER, output=str(LOG))
    assert found(own, process(400, parent=os.getpid())) == []


def test_groups_that_are_the_trees_alone() -> None:
    processes = [process(1, group=10), process(2, group=10), process(3, group=20), process(4, group=20)]
    dead = process(5, group=10, state="Z")
    scan = Scan({one.pid: one for one in [*processes, dead, process(6, group=os.getpgrp())]})
    assert own_groups({1, 2, 3, 6}, scan) == [10]
    assert own_groups({1, 2, 3, 4}, scan) == [10, 20]
    assert own_groups({1}, scan) == []


# -- what /proc shows --------------------------------------------------------------------------------------------------


def test_a_process_as_it_is(servers: Servers) -> None:
    odd = "a) R (b"
    tree, server = servers.start(
        f"import ctypes, os, time; ctypes.CDLL(None).prctl(15, {odd.encode()!r}, 0, 0, 0)\n"
        "os.write(1, str(os.getpid()).encode() + bytes([10])); time.sleep(60)"
    )
    servers.pids(tree, 1)
    seen = wait_for(lambda: one if (one := read_process(server.pid)) and one.state == "S" else None)
    assert (seen.pid, seen.parent, seen.session, seen.group) == (server.pid, os.getpid(), server.pid, server.pid)
    assert (seen.name, seen.state, seen.threads) == (odd, "S", 1)
    assert seen.outputs == {str(tree.log)}
    tree.log.unlink()
    again = read_process(server.pid)
    assert again is not None
    assert again.outputs == {str(tree.log)}, "a removed log keeps its name"
    assert read_processes()[server.pid] == again


def test_a_process_that_is_not_there() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    assert read_process(gone.pid) is None


def test_a_zombie_is_dead_and_one_whose_main_thread_ended_is_not(servers: Servers) -> None:
    _, ended = servers.start("")
    wait_for(lambda: (one := read_process(ended.pid)) and one.is_dead)
    _, half = servers.start(
        "import ctypes; libc = ctypes.PyDLL(None)\n"
        "libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)\n"
        "libc.syscall(60, 0)"  # exit, of this thread alone
    )
    seen = wait_for(lambda: one if (one := read_process(half.pid)) and one.state == "Z" else None)
    assert not seen.is_dead


def test_want_of_descriptors_is_no_proof_of_death() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            read_process(os.getpid())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_scans_are_shared_and_never_older_than_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, proceed = [], threading.Semaphore(0)  # type: list[int], threading.Semaphore

    def slow() -> dict[int, Process]:
        begun.append(len(begun))
        assert proceed.acquire(timeout=SECONDS)
        return {len(begun): process(len(begun))}

    monkeypatch.setattr(trees_module, "read_processes", slow)
    scanner = Scanner()
    first = asyncio.ensure_future(scanner.scan())
    while not begun:
        await asyncio.sleep(0.001)
    later = [asyncio.ensure_future(scanner.scan()) for _ in range(5)]
    await asyncio.sleep(0)
    later[0].cancel()  # who gives up takes nothing from the others
    proceed.release(2)
    scans = await asyncio.wait_for(asyncio.gather(*later[1:]), SECONDS)
    assert list((await first).processes) == [1]
    assert [list(scan.processes) for scan in scans] == [[2]] * 4
    assert len(begun) == 2


# -- ending them -------------------------------------------------------------------------------------------------------

SLEEPER = "import os, time; os.write(1, str(os.getpid()).encode() + bytes([10])); time.sleep(60)"
FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        break
os.write(1, str(os.getpid()).encode() + bytes([10]))
time.sleep(60)
"""
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {redirect}
        print(os.getpid(), file=open({report!r}, "w"), flush=True)
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(60)
"""


def reported(report: Path) -> int:
    """The number that a process leaves in a file."""
    return wait_for(lambda: int(text) if report.exists() and (text := report.read_text()) else None)


async def test_a_whole_family(servers: Servers, no_cgroups: Cgroups) -> None:
    tree, server = servers.start(FAMILY)
    pids = servers.pids(tree, 4)
    trees = Trees(no_cgroups)
    assert {one.pid for one in await trees.members(tree)} == set(pids)
    assert await trees.kill(tree) == []
    assert not [pid for pid in pids if is_alive(pid)]
    assert server.wait(SECONDS) == -signal.SIGKILL


async def test_a_tree_that_is_gone_is_gone_at_once(servers: Servers, no_cgroups: Cgroups) -> None:
    tree, server = servers.start("")
    server.wait(SECONDS)
    assert await Trees(no_cgroups).kill(tree, deadline=0) == []


async def test_neighbours_live_on(servers: Servers, no_cgroups: Cgroups) -> None:
    (tree, _), (_, other), (_, ours) = (
        servers.start(SLEEPER),
        servers.start(SLEEPER),
        servers.start(SLEEPER, session=False),
    )
    assert await Trees(no_cgroups).kill(tree) == []
    assert (other.poll(), ours.poll()) == (None, None)


@pytest.mark.usefixtures("subreaper")
async def test_a_daemon_that_left_session_and_parent_is_told_by_its_output(
    servers: Servers, no_cgroups: Cgroups, tmp_path: Path
) -> None:
    report = tmp_path / "pid"
    tree, _ = servers.start(DAEMON.format(redirect="pass", report=str(report)))
    pid = reported(report)
    trees = Trees(no_cgroups)
    assert pid in {one.pid for one in await trees.members(tree)}
    assert await trees.kill(tree) == []
    assert not is_alive(pid)
    assert read_process(pid) is None, "it came to this process as its subreaper, which has read its end"


@pytest.mark.usefixtures("subreaper")
async def test_one_that_changed_its_output_too_is_told_by_its_cgroup(
    servers: Servers, real_cgroups: Cgroups, tmp_path: Path
) -> None:
    report = tmp_path / "pid"
    group = real_cgroups.create("key1")
    assert group is not None
    code = DAEMON.format(
        redirect="null = os.open('/dev/null', os.O_RDWR); [os.dup2(null, n) for n in range(3)]", report=str(report)
    )
    tree, server = servers.start(f"open('{group}/cgroup.procs', 'w').write('0')\n{code}")
    pid = reported(report)
    real_cgroups.confirm(tree.key, server.pid)
    assert real_cgroups.available
    trees = Trees(real_cgroups)
    assert {one.pid for one in await trees.members(tree)} == {server.pid, pid}
    assert await trees.kill(tree) == []
    assert not is_alive(pid)
    real_cgroups.remove(tree.key)
    assert not group.exists()


BOMB = """
import os, sys, time
most = {most}
counter = os.open({counter!r}, os.O_RDWR | os.O_CREAT | os.O_APPEND)
def multiply():
    while os.fstat(counter).st_size < most:
        os.write(counter, b".")
        if os.fork() == 0:
            continue
        time.sleep(0.01)
    time.sleep(60)
for _ in range(29):
    if os.fork() == 0:
        break
multiply()
"""


async def test_a_tree_that_keeps_forking(servers: Servers, no_cgroups: Cgroups, tmp_path: Path) -> None:
    """Thirty processes, each of which forks on and on (up to 600 in all, for the sake of this machine)."""
    counter = tmp_path / "counter"
    tree, _ = servers.start(BOMB.format(most=600, counter=str(counter)))
    wait_for(lambda: counter.exists() and counter.stat().st_size >= 30)
    trees = Trees(no_cgroups)
    assert await trees.kill(tree, deadline=SECONDS) == []
    assert await trees.members(tree) == []
    size = counter.stat().st_size
    await asyncio.sleep(0.05)
    assert counter.stat().st_size == size, "nobody is left to fork"


RUNNER = """
import os, time
counter = os.open({counter!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
end = time.monotonic() + 30
while time.monotonic() < end:
    os.write(counter, b".")
    if os.fork() != 0:
        os._exit(0)
"""


@pytest.mark.usefixtures("subreaper")
async def test_one_that_forks_and_ends_faster_than_anyone_looks(
    servers: Servers, no_cgroups: Cgroups, tmp_path: Path
) -> None:
    """Each of its processes lives for a fraction of a millisecond; the group as a whole is killed at one stroke."""
    counter = tmp_path / "counter"
    tree, _ = servers.start(RUNNER.format(counter=str(counter)))
    wait_for(lambda: counter.exists() and counter.stat().st_size > 20)
    trees = Trees(no_cgroups)
    assert await trees.kill(tree, deadline=SECONDS) == []
    size = counter.stat().st_size
    await asyncio.sleep(0.05)
    assert counter.stat().st_size == size, "it runs no more"
    trees.reap_orphans(())


async def test_who_does_not_end_is_named(
    servers: Servers, no_cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it hung in the kernel."""
    tree, server = servers.start(SLEEPER)
    monkeypatch.setattr(trees_module, "kill_process", lambda process: None)
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    left = await asyncio.wait_for(Trees(no_cgroups).kill(tree, deadline=0.1), SECONDS)
    assert [one.pid for one in left] == [server.pid]


async def test_a_failed_look_is_repeated_and_not_taken_for_an_empty_tree(
    servers: Servers, no_cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, server = servers.start(SLEEPER)
    failures = [OSError(24, "Too many open files")] * 2

    def look() -> dict[int, Process]:
        if failures:
            raise failures.pop()
        return read_processes()

    monkeypatch.setattr(trees_module, "read_processes", look)
    monkeypatch.setattr(trees_module, "LONGEST_PAUSE", 0.01)
    assert await Trees(no_cgroups).kill(tree) == []
    assert not failures
    assert not is_alive(server.pid)


async def test_a_look_that_always_fails_is_an_error(
    servers: Servers, no_cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, _ = servers.start(SLEEPER)

    def look() -> dict[int, Process]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(trees_module, "read_processes", look)
    monkeypatch.setattr(trees_module, "LONGEST_PAUSE", 0.01)
    with pytest.raises(OSError, match="Too many"):
        await asyncio.wait_for(Trees(no_cgroups).kill(tree, deadline=0.1), SECONDS)


def test_a_number_that_is_anothers_by_now_is_not_killed(servers: Servers) -> None:
    _, server = servers.start(SLEEPER)
    seen = read_process(server.pid)
    assert seen is not None
    kill_process(process(server.pid, ticks=seen.start_ticks - 1))
    time.sleep(0.05)
    assert server.poll() is None
    kill_process(seen)
    assert server.wait(SECONDS) == -signal.SIGKILL
    kill_process(seen)


# -- orphans -----------------------------------------------------------------------------------------------------------

ORPHAN = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.write(1, str(os.getpid()).encode() + bytes([10]))
    time.sleep(60)
os.wait()
"""


def zombie(pid: int) -> Callable[[], bool]:
    return lambda: (one := read_process(pid)) is not None and one.is_dead


@pytest.mark.usefixtures("subreaper")
def test_orphans_are_read_and_ones_own_children_are_not(servers: Servers, no_cgroups: Cgroups) -> None:
    trees = Trees(no_cgroups)
    _, own = servers.start("", session=False)
    _, server = servers.start("")
    tree, parent = servers.start(ORPHAN)
    (orphan,) = servers.pids(tree, 1)
    parent.kill()
    parent.wait(SECONDS)
    os.kill(orphan, signal.SIGKILL)
    for pid in (own.pid, server.pid, orphan):
        wait_for(zombie(pid))
    own.wait(SECONDS)
    trees.reap_orphans({server.pid})
    assert zombie(server.pid)(), "its status is read by who started it"
    server.wait(SECONDS)
    trees.reap_orphans({server.pid})
    assert read_process(orphan) is None
    assert (own.returncode, server.returncode) == (0, 0)


@pytest.mark.usefixtures("subreaper")
def test_many_orphans_at_once(no_cgroups: Cgroups, tmp_path: Path) -> None:
    code = (
        "import os\n"
        "for _ in range(10):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid(); os.write(1, str(os.getpid()).encode() + bytes([10])); os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    pids = [int(word) for word in run.stdout.split()]
    for pid in pids:
        wait_for(lambda pid=pid: zombie(pid)() or read_process(pid) is None)  # type: ignore[misc]
    Trees(no_cgroups).reap_orphans(())
    assert [pid for pid in pids if read_process(pid) is not None] == []
    Trees(no_cgroups).reap_orphans(())
