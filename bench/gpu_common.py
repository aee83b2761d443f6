"""What the benchmarks on a GPU share: the GPU that they measure on, what is missing where there is none, its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bench.client import wait_until
from bench.common import BenchError, UnavailableError
from bench.docs import version
from bullpen.core.devices import Gpu, MemoryUse
from bullpen.errors import StateError
from bullpen.node.nvml import Nvml

SETTLED_MIB = 256
"""What others on the GPU may take or give back while we wait for ours to be free."""
FREE_SECONDS = 60.0


class Reader(Protocol):
    """What NVML says; ``bullpen.node.nvml.Nvml`` is one."""

    def list_gpus(self) -> list[Gpu]:
        """All GPUs."""

    def memory(self, uuid: str) -> MemoryUse:
        """The memory of one now."""

    def driver_version(self) -> str | None:
        """The driver's version; None where there is none."""


@dataclass(frozen=True)
class Device:
    """The GPU to measure on, and who tells its memory."""

    gpu: Gpu
    driver: str
    reader: Reader

    def memory(self) -> MemoryUse:
        """Its memory now.

        Raises:
            BenchError: the driver does not say.
        """
        try:
            return self.reader.memory(self.gpu.uuid)
        except StateError as problem:
            raise BenchError(str(problem)) from problem

    def used_mib(self) -> int:
        """What is held on it now, by whomever."""
        use = self.memory()
        return use.total_mib - use.free_mib

    def wait_used(self, mib: int) -> None:
        """Wait until no more than ``mib`` are held, nearly.

        Raises:
            BenchError: not in time.
        """
        what = f"the memory of GPU {self.gpu.index} to be free again"
        wait_until(lambda: self.used_mib() <= mib + SETTLED_MIB, FREE_SECONDS, what)

    @property
    def visible(self) -> dict[str, str]:
        """The variables that show a program this GPU alone."""
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpu.visible}


def find_device(reader: Reader | None = None) -> Device:
    """The GPU with the most free memory.

    Raises:
        UnavailableError: there is none, or the driver does not work.
    """
    reader = reader or Nvml()
    try:
        gpus, driver = reader.list_gpus(), reader.driver_version()
        if not gpus or driver is None:
            raise UnavailableError("there is no NVIDIA GPU here")
        return Device(max(gpus, key=lambda gpu: reader.memory(gpu.uuid).free_mib), driver, reader)
    except StateError as problem:
        raise UnavailableError(str(problem)) from problem


def require_cuda(distribution: str) -> None:
    """Make sure that a package is installed and is no CPU build.

    Raises:
        UnavailableError: it is not there, or cannot use a GPU.
    """
    found = version(distribution)
    if found == "not installed":
        raise UnavailableError(f"{distribution} is not installed: install its CUDA build")
    if found.endswith("+cpu"):
        raise UnavailableError(f"{distribution} {found} is a CPU build: install its CUDA build")


def describe(device: Device) -> str:
    """The hardware and the driver, for a page."""
    gpu = device.gpu
    return f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB), NVIDIA driver {device.driver}"
