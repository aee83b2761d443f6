"""A mock GPU for the benchmarks that measure on one, and a temporary place for their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.common import Options
from bench.gpu_common import Device
from bullpen.core.devices import Gpu, MemoryUse
from bullpen.node.mock_gpus import MockGpus

GPU_MIB = 8192


class Silent:
    """Progress that nobody watches; remembers what was begun."""

    def __init__(self) -> None:
        self.expected = 0
        self.steps: list[str] = []

    def expect(self, steps: int) -> None:
        self.expected = steps

    def step(self, what: str) -> None:
        self.steps.append(what)


class MockReader:
    """NVML, of one mock GPU."""

    def __init__(self, folder: Path) -> None:
        self.gpus = MockGpus(folder, 1, GPU_MIB)

    def list_gpus(self) -> list[Gpu]:
        return list(self.gpus.list())

    def memory(self, uuid: str) -> MemoryUse:
        return self.gpus.read(uuid)

    def driver_version(self) -> str | None:
        return "575.51.03"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(quick=True, folder=tmp_path, models=tmp_path / "models")


@pytest.fixture
def progress() -> Silent:
    return Silent()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A daemon's state directory, in which it keeps its mock GPUs."""
    return tmp_path / "state"


@pytest.fixture
def device(state: Path) -> Device:
    reader = MockReader(state / "mock-gpus")
    return Device(reader.list_gpus()[0], "575.51.03", reader)
