"""What the NVIDIA driver says about GPUs, through its management library (NVML).

Every call here can take long or hang, and belongs in one thread of its own: ``gpus`` has that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bullpen.core.devices import Gpu, GpuProcess, MemoryUse
from bullpen.errors import StateError
from bullpen.node import host_memory

logger = logging.getLogger(__name__)
ADVICE = "`nvidia-smi` may say more"


class Nvml:
    """The library, loaded at the first call and kept: to load it takes a good part of a second where nothing else
    keeps the driver up."""

    def __init__(self) -> None:
        self._loaded = False

    def list_gpus(self) -> list[Gpu]:
        """The GPUs of this host, in the order of the PCI bus, then all MIG devices. A GPU in MIG mode is not in the
        list, since no program can use it whole; its devices are. One that does not work is left out, with a warning.

        Returns:
            nothing where there is no driver.

        Raises:
            StateError: there is a driver and it does not work.
        """
        if not self._load():
            return []
        import pynvml

        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as problem:
            raise StateError(f"the NVIDIA driver does not count its GPUs: {problem}; {ADVICE}") from problem
        found: list[Gpu] = []
        trouble: Exception | None = None
        for index in range(count):
            try:
                found += devices(index)
            except pynvml.NVMLError as problem:
                logger.warning("GPU %d is left out: %s; %s", index, problem, ADVICE)
                trouble = problem
        if not found and trouble is not None:
            raise StateError(f"no GPU works with the NVIDIA driver: {trouble}; {ADVICE}") from trouble
        parts = [gpu for gpu in found if gpu.parent is not None]
        return [gpu for gpu in found if gpu.parent is None] + [
            replace(part, index=place) for place, part in enumerate(parts, count)
        ]

    def memory(self, uuid: str) -> MemoryUse:
        """The memory of a GPU or MIG device now.

        Raises:
            StateError: the driver does not say.
        """
        if not self._load():
            raise StateError(f"{uuid}: there is no NVIDIA driver any more")
        import pynvml

        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            total, free = read_memory(handle)
            return MemoryUse(total, free, read_processes(handle))
        except pynvml.NVMLError as problem:
            raise StateError(f"{uuid}: the NVIDIA driver does not say its memory: {problem}; {ADVICE}") from problem

    def driver_version(self) -> str | None:
        """The driver's version; None where there is no driver.

        Raises:
            StateError: there is a driver and it does not work.
        """
        if not self._load():
            return None
        import pynvml

        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError as problem:
            raise StateError(f"the NVIDIA driver does not say its version: {problem}; {ADVICE}") from problem

    def _load(self) -> bool:
        """Whether there is a driver."""
        import pynvml

        if not self._loaded:
            try:
                pynvml.nvmlInit()
            except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
                return False
            except pynvml.NVMLError as problem:
                raise StateError(f"the NVIDIA driver does not answer: {problem}; {ADVICE}") from problem
            self._loaded = True
        return True


def devices(index: int) -> list[Gpu]:
    """A GPU, or in MIG mode its devices, with its index."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    if not in_mig_mode(handle):
        return [describe(handle, index)]
    parent = pynvml.nvmlDeviceGetUUID(handle)
    return [describe(part, index, parent) for part in mig_handles(handle)]


def describe(handle: Any, index: int, parent: str | None = None) -> Gpu:
    """A GPU or MIG device as NVML shows it."""
    import pynvml

    total, _ = read_memory(handle)
    return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), total, parent)


def in_mig_mode(handle: Any) -> bool:
    """Whether a GPU is divided into MIG devices, be it into none so far."""
    import pynvml

    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def mig_handles(handle: Any) -> list[Any]:
    """The MIG devices of a GPU. Their places are numbered, and need not all be taken."""
    import pynvml

    found = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
        except pynvml.NVMLError_NotFound:
            continue
    return found


def read_memory(handle: Any) -> tuple[int, int]:
    """Total and free memory in MiB. A GPU without memory of its own (GB10, Jetson) shares the host's."""
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        return host_memory.total_mib(), host_memory.available_mib()
    return int(memory.total) >> 20, int(memory.free) >> 20


def read_processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Who uses a GPU, for computing or graphics; a process that does both is there once."""
    import pynvml

    held: dict[int, list[int]] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for pid, mib in ask_processes(ask, handle):
            known = held.setdefault(pid, [])
            if mib is not None:
                known.append(mib)
    return tuple(GpuProcess(pid, max(mib, default=None), process_name(pid)) for pid, mib in sorted(held.items()))


def ask_processes(ask: Callable[[Any], list[Any]], handle: Any) -> list[tuple[int, int | None]]:
    """Numbers and MiB; nobody where NVML does not tell: on MIG devices of some drivers, in some containers."""
    import pynvml

    try:
        answers = ask(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
        return []
    return [(int(one.pid), None if one.usedGpuMemory is None else int(one.usedGpuMemory) >> 20) for one in answers]


def process_name(pid: int) -> str:
    """A process's program, without its folder; empty where NVML does not tell."""
    import pynvml

    try:
        name = str(pynvml.nvmlSystemGetProcessName(pid))
    except (pynvml.NVMLError, UnicodeDecodeError):
        return ""
    return name.rpartition("/")[2]
