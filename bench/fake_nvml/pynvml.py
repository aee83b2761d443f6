"""NVIDIA's management library of a host with one GPU, whose every call hangs for as long as a file is there.

First on a daemon's path in place of the true one; the file's name is in the environment as ``FAKE_NVML_HANGS``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

NVML_DEVICE_MIG_ENABLE = 1
NVML_TEMPERATURE_GPU = 0
GIB = 1 << 30
HANGS = Path(os.environ["FAKE_NVML_HANGS"])
NOBODY: list[SimpleNamespace] = []

T = TypeVar("T")


class NVMLError(Exception):
    """What the library raises."""


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_FunctionNotFound(NVMLError):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


def answer(value: T) -> Callable[..., T]:
    """A call that returns this, when it does."""

    def call(*arguments: object) -> T:
        while HANGS.exists():
            time.sleep(0.05)
        return value

    return call


nvmlInit = answer(None)
nvmlShutdown = answer(None)
nvmlSystemGetDriverVersion = answer("580.65.06")
nvmlSystemGetProcessName = answer("")
nvmlDeviceGetCount = answer(1)
nvmlDeviceGetHandleByIndex = answer("GPU-0")
nvmlDeviceGetHandleByUUID = answer("GPU-0")
nvmlDeviceGetUUID = answer("GPU-0")
nvmlDeviceGetName = answer("A GPU that hangs")
nvmlDeviceGetMigMode = answer([0, 0])
nvmlDeviceGetMemoryInfo = answer(SimpleNamespace(total=80 * GIB, free=80 * GIB, used=0))
nvmlDeviceGetUtilizationRates = answer(SimpleNamespace(gpu=0, memory=0))
nvmlDeviceGetPowerUsage = answer(100_000)
nvmlDeviceGetEnforcedPowerLimit = answer(700_000)
nvmlDeviceGetTemperature = answer(40)
nvmlDeviceGetComputeRunningProcesses = answer(NOBODY)
nvmlDeviceGetGraphicsRunningProcesses = answer(NOBODY)
