"""What runs on this machine, seen without Bullpen's own code, so that it can be held against what Bullpen says."""

from __future__ import annotations

import os
from pathlib import Path


def command_lines() -> dict[int, str]:
    """The command line, or the title it was given, of every process that is no zombie."""
    lines = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX":
                continue
            lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return lines


def session_of(pid: int) -> int | None:
    """A process's session; None where it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def processes_of(instance_id: str, leader: int | None = None) -> dict[int, str]:
    """Processes that bear an instance's id in their title, or are in the session that its server led."""
    lines = command_lines()
    in_session = {pid for pid in lines if leader is not None and session_of(pid) == leader}
    return {pid: line for pid, line in lines.items() if f"bullpen: {instance_id} " in line or pid in in_session}


def open_descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def is_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    return pid in command_lines()
