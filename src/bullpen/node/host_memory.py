"""Host memory: what processes hold of it, and what is left."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bullpen.node import cgroups

MEMINFO = Path("/proc/meminfo")
PROC = Path("/proc")
RECLAIMABLE = frozenset({"active_file", "inactive_file", "slab_reclaimable"})
"""What a cgroup counts as used and the kernel takes back when it is needed: mostly the page cache."""


def tree_mib(pids: Iterable[int]) -> int:
    """What processes hold together, in MiB. A page that several map is divided among them (PSS), so forks of one
    parent are not counted with all that they share with it.

    Takes some milliseconds a GiB, so call it in a thread. Processes that are gone or hidden from this user count 0.
    """
    return sum(map(pss_kib, pids)) >> 10


def pss_kib(pid: int) -> int:
    """One process's share, in KiB."""
    with suppress(OSError):
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def total_mib() -> int:
    """The memory of this host, in MiB, whatever limit there is."""
    return meminfo_mib("MemTotal")


def available_mib() -> int:
    """What can still be used without swapping, in MiB: by the host's account, and by every cgroup (v2) with a limit
    that this process is in."""
    left = [mib for group in limited_groups() if (mib := left_mib(group)) is not None]
    return max(0, min([meminfo_mib("MemAvailable"), *left]))


def meminfo_mib(name: str) -> int:
    """One line of ``/proc/meminfo``, in MiB."""
    lines = MEMINFO.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) >> 10


def limited_groups() -> list[Path]:
    """The cgroups that this process is in and that may have a limit: its own and those above, as far as visible."""
    try:
        mounts, groups = cgroups.MOUNTS.read_text().splitlines(), cgroups.OWN.read_text().splitlines()
    except OSError:
        return []
    mount = next((Path(words[1]) for line in mounts if (words := line.split())[2:3] == ["cgroup2"]), None)
    own = next((line[3:] for line in groups if line.startswith("0::")), None)
    if mount is None or own is None or ".." in own:
        return []
    group = mount / own.lstrip("/")
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]


def left_mib(group: Path) -> int | None:
    """What a cgroup's limit leaves, in MiB; None where it has no limit."""
    try:
        limit = int((group / "memory.max").read_text())  # the word "max" where there is none
        used = int((group / "memory.current").read_text())
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(value) for name, value in lines if name in RECLAIMABLE)
    except (OSError, ValueError):
        return None
    return (limit - used + reclaimable) >> 20
