"""Files in shared memory: which processes map them, and removing those that a dead tree left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

FOLDER = "/dev/shm/"
GONE = " (deleted)"


def mapped_by(pids: Iterable[int]) -> set[Path]:
    """The files in shared memory that any of the processes maps. Slow with big processes: call it in a thread."""
    files = set()
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                _, found, name = line.rstrip("\n").partition(FOLDER)
                if found and not name.endswith(GONE):
                    files.add(Path(FOLDER + name))
    return files


def remove_leftovers(files: Iterable[Path], start_ticks: int) -> None:
    """Remove those files that no process maps any more and that are not older than the tree. Call it in a thread.

    Args:
        files: what the tree was seen to map.
        start_ticks: when the tree began, in kernel ticks since the boot.
    """
    began = boot_time() + start_ticks / os.sysconf("SC_CLK_TCK")
    left = {file for file in files if is_since(file, began)}
    if not left:
        return
    in_use = mapped_by(int(name) for name in os.listdir("/proc") if name.isdecimal())
    for file in left - in_use:
        with suppress(OSError):
            file.unlink()


def is_since(file: Path, began: float) -> bool:
    """Whether a file exists and was made since then; a second either way, for the two clocks differ."""
    try:
        return file.stat().st_ctime >= began - 1
    except OSError:
        return False


def boot_time() -> float:
    """When the kernel started, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
