"""What a tree leaves in shared memory goes with it; what is older, or anyone else's, stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bullpen.node import shared_memory
from bullpen.node.cgroups import Cgroups
from bullpen.node.trees import Tree, Trees, read_process
from tests.node.conftest import SECONDS, Servers

MAPPER = (
    "import mmap, os, sys, time\n"
    "file = os.open({path!r}, os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(file, 4096)\n"
    "memory = mmap.mmap(file, 4096); os.close(file)\n"
    "os.write(1, str(os.getpid()).encode() + bytes([10]))\n"
)
STAY = "time.sleep(60)"


@pytest.fixture
def path() -> Iterator[Path]:
    """A name in shared memory."""
    path = Path(f"/dev/shm/bullpen-test-{os.getpid()}-{os.urandom(4).hex()}")
    yield path
    path.unlink(missing_ok=True)


def start(servers: Servers, path: Path, then: str = STAY) -> Tree:
    tree, _ = servers.start(MAPPER.format(path=str(path)) + then)
    servers.pids(tree, 1)
    return tree


async def test_a_killed_tree_leaves_nothing(servers: Servers, no_cgroups: Cgroups, path: Path) -> None:
    tree = start(servers, path)
    assert path.exists()
    assert shared_memory.mapped_by([tree.leader]) == {path}
    assert await Trees(no_cgroups).kill(tree) == []
    assert not path.exists()


async def test_nor_does_one_that_ended_by_itself(servers: Servers, no_cgroups: Cgroups, path: Path) -> None:
    trees = Trees(no_cgroups)
    tree = start(servers, path)
    seen = await trees.shared_memory(tree)
    assert seen == {path}
    servers.end()
    assert path.exists()
    assert await trees.kill(tree, shared=seen) == []
    assert not path.exists()


async def test_what_is_older_than_the_tree_stays(servers: Servers, no_cgroups: Cgroups, path: Path) -> None:
    tree = start(servers, path)
    later = tree.start_ticks + 10 * os.sysconf("SC_CLK_TCK")
    trees = Trees(no_cgroups)
    seen = await trees.shared_memory(tree)
    servers.end()
    assert await trees.kill(Tree(tree.key, tree.leader, later, tree.log), shared=seen) == []
    assert path.exists()


async def test_what_another_maps_stays(servers: Servers, no_cgroups: Cgroups, path: Path) -> None:
    tree, other = start(servers, path), start(servers, path)
    trees = Trees(no_cgroups)
    assert await trees.kill(tree) == []
    assert path.exists()
    assert await trees.kill(other) == []
    assert not path.exists()


async def test_what_the_server_removed_itself_is_no_error(servers: Servers, no_cgroups: Cgroups, path: Path) -> None:
    tree = start(servers, path)
    trees = Trees(no_cgroups)
    seen = await trees.shared_memory(tree)
    path.unlink()
    assert await trees.shared_memory(tree) == set(), "removed, if still mapped"
    assert await trees.kill(tree, shared=seen) == []


def test_processes_that_are_gone_map_nothing() -> None:
    assert shared_memory.mapped_by([2**22 + 1]) == set()


def test_the_boot_was_before_this_process() -> None:
    own = read_process(os.getpid())
    assert own is not None
    began = shared_memory.boot_time() + own.start_ticks / os.sysconf("SC_CLK_TCK")
    assert abs(began - Path(f"/proc/{os.getpid()}").stat().st_ctime) < SECONDS
