"""What processes hold of the host's memory, and what is left under the limits of cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from bullpen.node import cgroups, host_memory
from bullpen.node.trees import Tree
from tests.node.conftest import Servers

MIB = 1 << 20
ALLOCATE = "import os, time; held = b'x' * ({mib} << 20); "
SAY = "os.write(1, str(os.getpid()).encode() + bytes([10])); "
STAY = "time.sleep(60)"


def start(servers: Servers, code: str, count: int) -> tuple[Tree, list[int]]:
    tree, _ = servers.start(code)
    return tree, servers.pids(tree, count)


def test_what_a_process_holds(servers: Servers) -> None:
    _, pids = start(servers, ALLOCATE.format(mib=64) + SAY + STAY, 1)
    assert 64 <= host_memory.tree_mib(pids) < 128


def test_forks_share_what_they_have_from_their_parent(servers: Servers) -> None:
    code = ALLOCATE.format(mib=128) + "os.fork() and os.fork(); " + SAY + STAY
    _, pids = start(servers, code, 3)
    assert len(set(pids)) == 3
    assert sum(psutil.Process(pid).memory_info().rss for pid in pids) > 3 * 128 * MIB
    assert 128 <= host_memory.tree_mib(pids) < 192


def test_what_is_gone_holds_nothing(servers: Servers) -> None:
    assert host_memory.tree_mib([]) == 0
    assert host_memory.tree_mib([2**22 + 1]) == 0
    _, process = servers.start("pass")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert host_memory.tree_mib([process.pid]) == 0, "a zombie"


def test_this_host() -> None:
    total = host_memory.total_mib()
    assert abs(total - psutil.virtual_memory().total / MIB) < 2
    assert 0 < host_memory.available_mib() < total


@pytest.fixture
def limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of paper with 1000 MiB free, and this process two cgroups deep."""
    group = tmp_path / "groups" / "pod" / "daemon"
    group.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal:  2048000 kB\nMemAvailable:    1024000 kB\n")
    (tmp_path / "mounts").write_text(f"proc /proc proc rw 0 0\ncgroup2 {tmp_path / 'groups'} cgroup2 rw 0 0\n")
    (tmp_path / "own").write_text("4:memory:/old\n0::/pod/daemon\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cgroups, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return tmp_path


def limit(group: Path, limit: str, used: int, stat: str = "anon 5\nfile 7\n") -> None:
    (group / "memory.max").write_text(limit + "\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(stat)


def test_without_limits_the_host_counts(limits: Path) -> None:
    assert host_memory.available_mib() == 1000
    limit(limits / "groups" / "pod" / "daemon", "max", 500 * MIB)
    assert host_memory.available_mib() == 1000


def test_a_limit_above_counts_as_well(limits: Path) -> None:
    limit(limits / "groups" / "pod" / "daemon", str(700 * MIB), 100 * MIB)
    assert host_memory.available_mib() == 600
    limit(limits / "groups" / "pod", str(400 * MIB), 150 * MIB)
    assert host_memory.available_mib() == 250


def test_a_wide_limit_leaves_what_the_host_has(limits: Path) -> None:
    limit(limits / "groups", str(9000 * MIB), 0)
    assert host_memory.available_mib() == 1000


def test_page_cache_is_not_lost(limits: Path) -> None:
    stat = f"active_file {10 * MIB}\ninactive_file {20 * MIB}\nslab_reclaimable {MIB}\nshmem {5 * MIB}\n"
    limit(limits / "groups" / "pod", str(100 * MIB), 90 * MIB, stat)
    assert host_memory.available_mib() == 41


def test_beyond_the_limit_nothing_is_left(limits: Path) -> None:
    limit(limits / "groups" / "pod", str(100 * MIB), 300 * MIB)
    assert host_memory.available_mib() == 0


@pytest.mark.parametrize("own", ["4:memory:/old\n", "0::/../outside\n", ""])
def test_a_cgroup_out_of_sight_is_no_limit(limits: Path, own: str) -> None:
    limit(limits / "groups", str(100 * MIB), 0)
    (limits / "own").write_text(own)
    assert host_memory.available_mib() == 1000
