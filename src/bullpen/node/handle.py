"""What the daemon holds of one instance's process, and how that process ended."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

from bullpen.node.zygote import Leased

STATUS_SECONDS = 1.0
"""How long to wait for the zygote to tell the status of a process that has ended."""


@dataclass
class Handle:
    """What the daemon holds of one instance's process."""

    leased: Leased | None = None
    pidfd: int = -1
    followed: bool = False
    """Whether the end of the process is going to be reported."""
    shared: set[Path] = field(default_factory=set)
    """Files in shared memory that the tree was seen to map."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    log_start: int = 0
    """How long the log was before this process wrote into it."""
    kill: asyncio.Task[None] | None = None
    oom_kills_before: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Begin to count."""
        self.oom_kills_before = count_oom_kills()

    def oom_kills(self) -> int | None:
        """How many processes the kernel's out-of-memory killer has ended on this host since this was made."""
        now = count_oom_kills()
        return None if now is None or self.oom_kills_before is None else now - self.oom_kills_before


def count_oom_kills() -> int | None:
    """The kernel's own count; None where it keeps none."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


async def exit_status(handle: Handle) -> int | None:
    """How a process ended: told by the zygote, its parent; or read from the kernel where the zygote is gone and the
    process has become a child of ours; None where neither saw it."""
    if handle.leased is not None:
        try:
            status = await asyncio.wait_for(asyncio.shield(handle.leased.status), STATUS_SECONDS)
        except TimeoutError:
            status = None
        if status is not None:
            return status
    return adopted_status(handle.pidfd)


def adopted_status(pidfd: int) -> int | None:
    """How a process ended that has become a child of this one; None where it has not."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
