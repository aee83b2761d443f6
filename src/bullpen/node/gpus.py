"""The accelerators of this host, by UUID and index."""

from __future__ import annotations

from dataclasses import dataclass

from bullpen.errors import StateError


@dataclass(frozen=True)
class Gpu:
    """One accelerator; ``index`` is what ``CUDA_VISIBLE_DEVICES`` counts by."""

    index: int
    uuid: str
    name: str
    memory_mib: int


def mock_gpus(count: int) -> list[Gpu]:
    """Accelerators that do not exist, for tests and for machines without any."""
    return [Gpu(index, f"GPU-{index}", "mock", 81920) for index in range(count)]


def nvidia_gpus() -> list[Gpu]:
    """What NVML shows; nothing where there is no driver.

    Raises:
        StateError: there is a driver and it does not work.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as problem:
        raise StateError(f"the NVIDIA driver does not answer: {problem}; `nvidia-smi` may say more") from problem
    try:
        return [describe(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def describe(index: int) -> Gpu:
    """One accelerator as NVML shows it."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), int(memory.total) >> 20)
