"""Brings files into the page cache ahead of a start, so that weights come from memory and not from the disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bullpen.node import host_memory

CHUNK = 128 << 10
"""Bytes asked for at once. The kernel reads no more than one readahead window for a call, however much it asks for;
this is the usual window."""
WINDOW = 16 << 20
"""Bytes between two looks at whether to go on."""
MOST_SHARE = 0.75
"""Of the memory that is available. The rest is for the start itself; more would push its own beginning out again."""


async def prefetch(files: Iterable[Path], stop: asyncio.Event | None = None) -> int:
    """Ask the kernel to read files, in their order, as far as the memory allows.

    The kernel reads at its own pace: when this returns, the last part may still be on its way. Files that cannot be
    read are passed over; whoever needs them will say so better.

    Args:
        files: which ones.
        stop: set it to end early.

    Returns:
        how many MiB were asked for.
    """
    left = int(await asyncio.to_thread(host_memory.available_mib) * MOST_SHARE) << 20
    asked = 0
    for file in files:
        offset = 0
        while left > 0 and not (stop is not None and stop.is_set()):
            count = await asyncio.to_thread(advise, file, offset, min(WINDOW, left))
            if count == 0:
                break
            offset += count
            asked += count
            left -= count
    return asked >> 20


def advise(file: Path, offset: int, length: int) -> int:
    """Ask for a part of a file; return how many bytes of it there are, 0 at its end."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            end = min(offset + length, os.fstat(descriptor).st_size)
            for start in range(offset, end, CHUNK):
                os.posix_fadvise(descriptor, start, min(CHUNK, end - start), os.POSIX_FADV_WILLNEED)
            return max(0, end - offset)
        finally:
            os.close(descriptor)
    return 0
