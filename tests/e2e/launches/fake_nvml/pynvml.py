"""As much of NVML as the daemon uses: a driver with GPUs that do nothing, which hangs for as long as it is told to.

In the folder that `FAKE_NVML` names, a file ``hang`` makes every call wait; each call that waits leaves a file there.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

COUNT = 3
NVML_DEVICE_MIG_ENABLE = 1
NVML_TEMPERATURE_GPU = 0
GIB = 1 << 30
_numbers = itertools.count()


class NVMLError(Exception):
    """What goes wrong."""


class NVMLError_LibraryNotFound(NVMLError):
    """There is no library."""


class NVMLError_DriverNotLoaded(NVMLError):
    """There is no driver."""


class NVMLError_NotSupported(NVMLError):
    """The GPU cannot."""


class NVMLError_NotFound(NVMLError):
    """There is no such thing."""


class NVMLError_NoPermission(NVMLError):
    """The caller may not."""


class NVMLError_FunctionNotFound(NVMLError):
    """The driver is too old."""


def _answer() -> None:
    """Return when the driver answers."""
    folder = Path(os.environ["FAKE_NVML"])
    if not (folder / "hang").exists():
        return
    waiting = folder / f"waiting-{os.getpid()}-{threading.get_native_id()}-{next(_numbers)}"
    waiting.touch()
    while (folder / "hang").exists():
        time.sleep(0.01)
    waiting.unlink()


def nvmlInit() -> None:
    """Load the driver."""
    _answer()


def nvmlShutdown() -> None:
    """Let go of it."""


def nvmlSystemGetDriverVersion() -> str:
    """Its version."""
    return "580.65.06"


def nvmlDeviceGetCount() -> int:
    """How many GPUs there are."""
    _answer()
    return COUNT


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    """A GPU."""
    _answer()
    return index


def nvmlDeviceGetHandleByUUID(uuid: str) -> int:
    """A GPU."""
    _answer()
    return int(uuid.removeprefix("GPU-"))


def nvmlDeviceGetUUID(handle: int) -> str:
    """Its name among all."""
    return f"GPU-{handle}"


def nvmlDeviceGetName(handle: int) -> str:
    """What it is."""
    return "NVIDIA H200"


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    """Its memory in bytes."""
    _answer()
    return SimpleNamespace(total=80 * GIB, free=80 * GIB, used=0)


def nvmlDeviceGetMigMode(handle: int) -> list[int]:
    """It is not divided."""
    return [0, 0]


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:
    """Nobody uses it."""
    return []


nvmlDeviceGetGraphicsRunningProcesses = nvmlDeviceGetComputeRunningProcesses


def nvmlSystemGetProcessName(pid: int) -> str:
    """Nobody is known."""
    raise NVMLError_NotFound(pid)


def nvmlDeviceGetUtilizationRates(handle: int) -> SimpleNamespace:
    """It does nothing."""
    return SimpleNamespace(gpu=0, memory=0)


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    """In milliwatts."""
    return 70_000


def nvmlDeviceGetEnforcedPowerLimit(handle: int) -> int:
    """In milliwatts."""
    return 700_000


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
    """In degrees."""
    return 30
