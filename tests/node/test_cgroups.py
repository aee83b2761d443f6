"""Control groups: used where this user may make them, and done without where not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bullpen.node import cgroups as cgroups_module
from bullpen.node.cgroups import Cgroups
from tests.node.conftest import SECONDS, Servers, is_alive, wait_for


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders that look like a hierarchy, with this process in ``/own``."""
    mount = tmp_path / "cgroup"
    (mount / "own").mkdir(parents=True)
    (mount / "own" / "cgroup.procs").write_text("")
    describe(monkeypatch, tmp_path, f"cgroup2 {mount} cgroup2 rw 0 0", "0::/own")
    return mount / "own"


def describe(monkeypatch: pytest.MonkeyPatch, folder: Path, mounts: str, own: str) -> None:
    (folder / "mounts").write_text(f"proc /proc proc rw 0 0\n{mounts}\n")
    (folder / "own").write_text(f"3:cpu:/elsewhere\n{own}\n")
    monkeypatch.setattr(cgroups_module, "MOUNTS", folder / "mounts")
    monkeypatch.setattr(cgroups_module, "OWN", folder / "own")


def test_each_instance_has_one_below_the_daemons_own(hierarchy: Path) -> None:
    cgroups = Cgroups("x")
    assert cgroups.available
    group = cgroups.create("key")
    assert group == hierarchy / "bullpen-x" / "key"
    assert cgroups.create("key") == group
    (group / "cgroup.procs").write_text("12\n13\n")
    assert cgroups.pids("key") == [12, 13]
    assert cgroups.pids("other") == []


def test_groups_that_a_server_made_below_count(hierarchy: Path) -> None:
    cgroups = Cgroups("x")
    group = cgroups.create("key")
    assert group is not None
    (group / "cgroup.procs").write_text("12\n")
    (group / "sub" / "sub").mkdir(parents=True)
    (group / "sub" / "sub" / "cgroup.procs").write_text("14\n")
    assert sorted(cgroups.pids("key")) == [12, 14]


def test_empty_ones_are_removed_with_all_below(hierarchy: Path) -> None:
    cgroups = Cgroups("x")
    group = cgroups.create("key")
    assert group is not None
    (group / "sub").mkdir()
    cgroups.create("other")
    cgroups.remove("key")
    cgroups.remove("key")
    assert not group.exists()
    cgroups.close()
    assert not (hierarchy / "bullpen-x").exists()


def test_a_server_that_is_not_in_its_group_makes_them_untrusted(hierarchy: Path) -> None:
    cgroups = Cgroups("x")
    group = cgroups.create("key")
    assert group is not None
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
    cgroups.confirm("key", os.getpid())
    assert cgroups.available
    cgroups.confirm("other", 2**22 + 1)
    assert cgroups.available, "a process that is gone proves nothing"
    cgroups.confirm("other", os.getpid())
    assert Cgroups("x").available is not cgroups.available
    assert cgroups.pids("key") == [os.getpid()], "what is in one still counts"


@pytest.mark.parametrize(
    ("mounts", "own"),
    [
        ("", "0::/own"),
        ("cgroup {folder} cgroup rw 0 0", "0::/own"),
        ("cgroup2 {folder} cgroup2 rw 0 0", ""),
        ("cgroup2 {folder} cgroup2 rw 0 0", "0::/../outside"),
        ("cgroup2 {folder}/nowhere cgroup2 rw 0 0", "0::/own"),
    ],
    ids=["none", "version 1", "no own", "outside", "gone"],
)
def test_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, own: str) -> None:
    (tmp_path / "outside").mkdir()
    describe(monkeypatch, tmp_path, mounts.format(folder=tmp_path / "mount"), own)
    cgroups = Cgroups("x")
    assert not cgroups.available
    assert cgroups.create("key") is None
    assert cgroups.pids("key") == []
    cgroups.kill("key")
    cgroups.confirm("key", os.getpid())
    cgroups.remove("key")
    cgroups.close()
    assert list((tmp_path / "outside").iterdir()) == []


def test_without_proc_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups_module, "MOUNTS", tmp_path / "nothing")
    assert not Cgroups("x").available


def test_a_real_one_is_left_by_nobody(servers: Servers, real_cgroups: Cgroups, tmp_path: Path) -> None:
    group = real_cgroups.create("key")
    assert group is not None
    tree, server = servers.start(
        f"open('{group}/cgroup.procs', 'w').write('0')\n"
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n"
        "os.write(1, str(os.getpid()).encode() + bytes([10])); time.sleep(60)"
    )
    pids = servers.pids(tree, 2)
    assert sorted(real_cgroups.pids("key")) == sorted(pids)
    real_cgroups.confirm("key", server.pid)
    assert real_cgroups.available
    real_cgroups.remove("key")
    assert group.exists(), "one with processes in it stays"
    if not (group / "cgroup.kill").exists():
        pytest.skip("this kernel cannot kill a cgroup at one stroke")
    real_cgroups.kill("key")
    server.wait(SECONDS)
    wait_for(lambda: not [pid for pid in pids if is_alive(pid)])
    real_cgroups.remove("key")
    assert not group.exists()
