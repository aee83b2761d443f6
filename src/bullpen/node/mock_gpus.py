"""GPUs that do not exist, for work on everything around them; who holds their memory is real.

A folder has one sub-folder for each GPU, named by its index. In it are ``total``, the GPU's memory in MiB, and one file
for each process that holds some, named by its pid and with the MiB as text. The simulator's engine writes those; it
finds the folder by the variable ``BULLPEN_MOCK_GPU_DIR``. As on a real GPU, a process that has ended holds nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from bullpen.core.devices import Gpu, GpuProcess, MemoryUse, select
from bullpen.errors import StateError
from bullpen.node.shared_memory import boot_time
from bullpen.node.trees import Process, read_process

MEMORY_MIB = 81920
SLACK = 1.0
"""Seconds. A file so much older than the process of its name was left by an earlier process of that number."""


def describe_mock(index: int, memory_mib: int = MEMORY_MIB) -> Gpu:
    """One that does not exist."""
    return Gpu(index, f"GPU-{index}", "mock", memory_mib)


class MockGpus:
    """A host's mock GPUs; see ``gpus.Gpus``.

    Args:
        folder: where their memory is noted; made if need be. What living processes have noted there stays.
        count: how many.
        memory_mib: the memory of each, in MiB.
        visible: a value of ``CUDA_VISIBLE_DEVICES``; None for all.

    Raises:
        StateError: the folder cannot be written.
    """

    def __init__(self, folder: Path, count: int, memory_mib: int = MEMORY_MIB, *, visible: str | None = None) -> None:
        self.folder = folder
        self._gpus = tuple(select([describe_mock(index, memory_mib) for index in range(count)], visible))
        try:
            for gpu in self._gpus:
                place = folder / str(gpu.index)
                place.mkdir(parents=True, exist_ok=True)
                for file in list(place.iterdir()):
                    if file.name.isdecimal() and find_holder(file) is None:
                        file.unlink(missing_ok=True)
                (place / "total").write_text(f"{memory_mib}\n")
        except OSError as problem:
            raise StateError(f"mock GPUs cannot be kept in {folder}: {problem.strerror or problem}") from problem

    def list(self) -> tuple[Gpu, ...]:
        """All of them."""
        return self._gpus

    async def memory(self, uuid: str) -> MemoryUse:
        """The memory of one of them now.

        Raises:
            StateError: there is no such one, or its folder cannot be read.
        """
        return self.read(uuid)

    def read(self, uuid: str) -> MemoryUse:
        """As `memory`, for callers without an event loop."""
        gpu = next((gpu for gpu in self._gpus if gpu.uuid == uuid), None)
        if gpu is None:
            raise StateError(f"there is no mock GPU {uuid}")
        place = self.folder / str(gpu.index)
        try:
            total = int((place / "total").read_text())
            files = sorted(file for file in place.iterdir() if file.name.isdecimal())
        except (OSError, ValueError) as problem:
            raise StateError(f"the mock GPU {uuid} in {place} cannot be read: {problem}") from problem
        processes = tuple(process for file in files if (process := read_holding(file)) is not None)
        return MemoryUse(total, max(0, total - sum(process.mib or 0 for process in processes)), processes)


def read_holding(file: Path) -> GpuProcess | None:
    """What a process has noted; None if it has ended, or the text is no number."""
    with suppress(OSError, ValueError):
        mib = int(file.read_text())
        process = find_holder(file)
        if process is not None and mib > 0:
            return GpuProcess(process.pid, mib, process.name)
    return None


def find_holder(file: Path) -> Process | None:
    """The process that wrote a file, if it lives."""
    process = read_process(int(file.name))
    if process is None or process.is_dead:
        return None
    started = boot_time() + process.start_ticks / os.sysconf("SC_CLK_TCK")
    try:
        return process if started <= file.stat().st_mtime + SLACK else None
    except FileNotFoundError:
        return None  # taken back since
