"""Control groups (v2) where this user may make them: the one way a process cannot leave its tree."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("bullpen")

MOUNTS = Path("/proc/self/mounts")
OWN = Path("/proc/self/cgroup")


class Cgroups:
    """One cgroup for each instance, below the daemon's own. Where that is not allowed, none; callers cope.

    Args:
        name: distinguishes the daemons of one host.
    """

    def __init__(self, name: str) -> None:
        self._root = writable_root(name)
        self._escaped = False

    @property
    def available(self) -> bool:
        """Whether trees are held by cgroups here."""
        return self._root is not None and not self._escaped

    def confirm(self, key: str, pid: int | None) -> None:
        """Look whether a server is in its instance's cgroup; where one could not be moved, no other is trusted."""
        if self.available and pid is not None and pid not in self.pids(key) and os.path.exists(f"/proc/{pid}"):
            logger.warning("processes cannot be moved into cgroups below %s; trees are told by other marks", self._root)
            self._escaped = True

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
        """The processes in an instance's cgroup, and in those that it made below."""
        if self._root is None:
            return []
        found: list[int] = []
        for group in below(self._root / key):
            with suppress(OSError):
                found += [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        return found

    def kill(self, key: str) -> None:
        """SIGKILL everything in an instance's cgroup at once (Linux 5.14)."""
        if self._root is not None:
            with suppress(OSError):
                (self._root / key / "cgroup.kill").write_text("1")

    def remove(self, key: str) -> None:
        """Remove an instance's empty cgroup, and what it made below."""
        if self._root is not None:
            for group in reversed(below(self._root / key)):
                with suppress(OSError):
                    group.rmdir()

    def close(self) -> None:
        """Remove the daemon's part of the hierarchy, as far as it is empty."""
        if self._root is not None:
            for group in reversed(below(self._root)):
                with suppress(OSError):
                    group.rmdir()


def below(group: Path) -> list[Path]:
    """A cgroup and all below it, parents first."""
    return [Path(folder) for folder, _, _ in os.walk(group)]


def writable_root(name: str) -> Path | None:
    """Make and return the directory below which instances get their cgroups, if this user may."""
    try:
        mounts, groups = MOUNTS.read_text().splitlines(), OWN.read_text().splitlines()
    except OSError:
        return None
    mount = next((Path(words[1]) for line in mounts if (words := line.split())[2:3] == ["cgroup2"]), None)
    own = next((line[3:] for line in groups if line.startswith("0::")), None)
    # A path that climbs lies outside what this container may see.
    if mount is None or own is None or ".." in own:
        return None
    root = mount / own.lstrip("/") / f"bullpen-{name}"
    try:
        root.mkdir(exist_ok=True)
    except OSError:
        return None
    # Moving a process needs write access to the common ancestor's list as well.
    return root if os.access(root.parent / "cgroup.procs", os.W_OK) else None
