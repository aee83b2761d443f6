"""This host at one moment: load, memory as far as this process may use it, and what its GPUs do.

Nothing here waits long: a driver that does not answer is reported as a problem.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bullpen.core.devices import Gpu
from bullpen.errors import StateError
from bullpen.node import host_memory
from bullpen.node.gpus import Driver
from bullpen.node.mock_gpus import MockGpus
from bullpen.node.resources import Resources

DRIVER_SECONDS = 5.0
NO_GPU = "nvidia-smi is unavailable on this host: no NVIDIA driver shows a GPU."


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None where the driver does not tell. Memory is in MiB, power in watts."""

    gpu_id: int
    uuid: str | None
    name: str
    utilization_percent: float | None = None
    memory_total_mib: int | None = None
    memory_used_mib: int | None = None
    memory_free_mib: int | None = None
    temperature_c: int | None = None
    power_draw_watts: float | None = None
    power_limit_watts: float | None = None


class HostStats:
    """Reads this host.

    Args:
        resources: the daemon's; its GPUs are mock ones or the driver's.
        seconds: how long the driver may take to answer.
        read: asks the driver for all GPUs.
    """

    def __init__(
        self,
        resources: Resources,
        seconds: float = DRIVER_SECONDS,
        read: Callable[[], list[GpuReading]] | None = None,
    ) -> None:
        self._resources = resources
        # A thread of its own: what waits for memory on a GPU must not wait for this.
        self._driver = Driver(seconds)
        self._read = read or read_nvidia

    async def read(self, owners: Callable[[str], Sequence[str]]) -> dict[str, Any]:
        """Everything, as JSON data.

        Args:
            owners: the launches on a GPU, by its UUID.
        """
        readings, problem = await self._gpus()
        return {
            **load(),
            **await asyncio.to_thread(memory),
            "gpu_count": len(readings),
            "gpus": [{**asdict(one), "launch_ids": list(owners(one.uuid or ""))} for one in readings],
            "nvidia_smi_error": problem,
        }

    async def _gpus(self) -> tuple[list[GpuReading], str | None]:
        gpus = self._resources.gpus
        try:
            if isinstance(gpus, MockGpus):
                readings = [mock_reading(gpu, gpus) for gpu in gpus.list()]
            else:
                readings = await self._driver.call(self._read)
        except StateError as problem:
            return [], str(problem)
        return sorted(readings, key=lambda one: one.gpu_id), None if readings else NO_GPU


def load() -> Mapping[str, Any]:
    """Load averages and processors."""
    averages: tuple[float | None, ...] = (None, None, None)
    with suppress(OSError):
        averages = os.getloadavg()
    return {
        **dict(zip(("load_avg_1m", "load_avg_5m", "load_avg_15m"), averages, strict=True)),
        "cpu_count": os.cpu_count(),
    }


def memory() -> Mapping[str, Any]:
    """Host memory in bytes: what all limits leave to this process, where it has any."""
    try:
        total, available = total_mib() << 20, host_memory.available_mib() << 20
    except (OSError, StopIteration, ValueError) as problem:
        names = ("memory_total_bytes", "memory_available_bytes", "memory_used_bytes", "memory_utilization_percent")
        return {**dict.fromkeys(names), "host_memory_error": f"/proc/meminfo cannot be read: {problem}"}
    used = max(0, total - available)
    return {
        "memory_total_bytes": total,
        "memory_available_bytes": available,
        "memory_used_bytes": used,
        "memory_utilization_percent": round(100 * used / total, 2) if total else None,
        "host_memory_error": None,
    }


def total_mib() -> int:
    """The host's memory in MiB, or the least that a cgroup of this process may have."""
    limits = [mib for group in host_memory.limited_groups() if (mib := limit_mib(group)) is not None]
    return min([host_memory.total_mib(), *limits])


def limit_mib(group: Path) -> int | None:
    """A cgroup's limit in MiB; None where it has none."""
    try:
        return int((group / "memory.max").read_text()) >> 20  # the word "max" where there is none
    except (OSError, ValueError):
        return None


def mock_reading(gpu: Gpu, gpus: MockGpus) -> GpuReading:
    """A GPU that does not exist. Raises StateError where its folder cannot be read."""
    use = gpus.read(gpu.uuid)
    return GpuReading(
        gpu.index,
        gpu.uuid,
        gpu.name,
        memory_total_mib=use.total_mib,
        memory_used_mib=use.total_mib - use.free_mib,
        memory_free_mib=use.free_mib,
    )


def read_nvidia() -> list[GpuReading]:
    """All GPUs that the driver shows; none where there is no driver. May hang as long as the driver does.

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
        return [nvidia_reading(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as problem:
        raise StateError(f"the NVIDIA driver does not show its GPUs: {problem}; `nvidia-smi` may say more") from problem
    finally:
        pynvml.nvmlShutdown()  # the library counts: others that use it keep it


def nvidia_reading(index: int) -> GpuReading:
    """One GPU, by the driver's own counting."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except (pynvml.NVMLError, UnicodeDecodeError):
            return None

    held = ask(pynvml.nvmlDeviceGetMemoryInfo)
    busy = ask(pynvml.nvmlDeviceGetUtilizationRates)
    draw, limit = ask(pynvml.nvmlDeviceGetPowerUsage), ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    return GpuReading(
        index,
        ask(pynvml.nvmlDeviceGetUUID),
        ask(pynvml.nvmlDeviceGetName) or "unknown",
        utilization_percent=None if busy is None else float(busy.gpu),
        memory_total_mib=None if held is None else int(held.total) >> 20,
        memory_used_mib=None if held is None else int(held.used) >> 20,
        memory_free_mib=None if held is None else int(held.free) >> 20,
        temperature_c=ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        power_draw_watts=None if draw is None else draw / 1000,
        power_limit_watts=None if limit is None else limit / 1000,
    )
