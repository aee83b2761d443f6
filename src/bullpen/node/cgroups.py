"""Control groups (v2) where this user may make them: the one way a process cannot leave its tree."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
OWN = Path("/proc/self/cgroup")


class Cgroups:
    """One cgroup for each instance, below the daemon's own. Where that is not allowed, none; callers cope.

    Args:
        name: distinguishes the daemons of one host.
    """

    def __init__(self, name: str) -> None:
        self._root = writable_root(name)

    @property
    def available(self) -> bool:
        """Whether trees are held by cgroups here."""
        return self._root is not None

    def create(self, key: str) -> Path | None:
        """Make an instance's cgroup; None where there is none."""
        if self._root is None:
            return None
        group = self._root / key
        try:
            group.mkdir(exist_ok=True)
        except OSError:
            return None
        return group

    def pids(self, key: str) -> list[int]:
        """The processes in an instance's cgroup."""
        if self._root is None:
            return []
        try:
            return [int(pid) for pid in (self._root / key / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def kill(self, key: str) -> None:
        """SIGKILL everything in an instance's cgroup at once (Linux 5.14)."""
        if self._root is not None:
            with suppress(OSError):
                (self._root / key / "cgroup.kill").write_text("1")

    def remove(self, key: str) -> None:
        """Remove an instance's empty cgroup."""
        if self._root is not None:
            with suppress(OSError):
                (self._root / key).rmdir()

    def close(self) -> None:
        """Remove the daemon's part of the hierarchy, where it is empty."""
        if self._root is not None:
            with suppress(OSError):
                self._root.rmdir()


def writable_root(name: str) -> Path | None:
    """Make and return the directory below which instances get their cgroups, if this user may."""
    mount = next(
        (Path(line.split()[1]) for line in MOUNTS.read_text().splitlines() if line.split()[2] == "cgroup2"), None
    )
    own = next((line[3:] for line in OWN.read_text().splitlines() if line.startswith("0::")), None)
    if mount is None or own is None:
        return None
    root = mount / own.lstrip("/") / f"bullpen-{name}"
    try:
        root.mkdir(exist_ok=True)
    except OSError:
        return None
    # Moving a process needs write access to the common ancestor's list as well.
    return root if os.access(root.parent / "cgroup.procs", os.W_OK) else None
