"""GPUs as NVML shows them, a driver that hangs, and waiting for memory."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml as real_pynvml
import pytest

from bullpen.core.devices import Gpu, GpuProcess, MemoryUse
from bullpen.errors import StateError
from bullpen.node import host_memory
from bullpen.node.gpus import (
    Driver,
    NvidiaGpus,
    find_gpus,
    foreign_processes,
    wait_for_memory,
)
from bullpen.node.mock_gpus import MockGpus, describe_mock
from bullpen.node.nvml import Nvml
from bullpen.node.settings import Settings
from tests.node.conftest import SECONDS

GIB = 1 << 30


# -- a driver of paper -----------------------------------------------------------------------------------------------


@dataclass
class Device:
    """A GPU or MIG device, and its handle at once. An error in place of a value is raised where it is asked for."""

    uuid: str
    memory: tuple[int, int] | Exception = (80 * GIB, 79 * GIB)
    compute: list[tuple[int, int | None]] | Exception = field(default_factory=list)
    graphics: list[tuple[int, int | None]] | Exception = field(default_factory=list)
    mig: int | Exception = 0
    parts: list[Device | None] = field(default_factory=list)
    lost: Exception | None = None


class FakeNvml(ModuleType):
    """The part of pynvml that is used, with its own errors; behaves as NVML's documentation says."""

    NVML_DEVICE_MIG_ENABLE = real_pynvml.NVML_DEVICE_MIG_ENABLE

    def __init__(self, devices: list[Device]) -> None:
        super().__init__("pynvml")
        self.devices = devices
        self.no_init: Exception | None = None
        self.names: dict[int, str | Exception] = {}
        self.inits = 0
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVMLError"):
            return getattr(real_pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.no_init is not None:
            raise self.no_init
        self.inits += 1

    def nvmlDeviceGetCount(self) -> int:
        if not self.inits:
            raise error("Uninitialized")
        return len(self.devices)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        device = self.devices[index]
        if device.lost is not None:
            raise device.lost
        return device

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        self.calls += 1
        self.gate.wait(SECONDS)
        every = [*self.devices, *(part for device in self.devices for part in device.parts if part is not None)]
        for device in every:
            if device.uuid == uuid:
                return device
        raise error("NotFound")

    def nvmlDeviceGetUUID(self, handle: Device) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Device) -> str:
        return "NVIDIA H200" if handle.uuid.startswith("GPU-") else "NVIDIA H200 MIG 1g.18gb"

    def nvmlDeviceGetMemoryInfo(self, handle: Device) -> SimpleNamespace:
        total, free = value(handle.memory)
        return SimpleNamespace(total=total, free=free, used=total - free)

    def nvmlDeviceGetMigMode(self, handle: Device) -> list[int]:
        return [value(handle.mig), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Device) -> int:
        return len(handle.parts)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Device, place: int) -> Device:
        part = handle.parts[place]
        if part is None:
            raise error("NotFound")
        return part

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Device) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in value(handle.compute)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Device) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in value(handle.graphics)]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        return str(value(self.names.get(pid, error("NotFound"))))


def value(what: Any) -> Any:
    if isinstance(what, Exception):
        raise what
    return what


def error(name: str) -> Exception:
    made = getattr(real_pynvml, f"NVMLError_{name}")()
    assert isinstance(made, Exception)
    return made


Install = Callable[..., FakeNvml]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    made: list[FakeNvml] = []

    def put(*devices: Device) -> FakeNvml:
        fake = FakeNvml(list(devices))
        made.append(fake)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    yield put
    for fake in made:
        fake.gate.set()


def test_the_fake_has_no_name_that_the_library_lacks() -> None:
    names = [name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 10
    assert [name for name in names if not hasattr(real_pynvml, name)] == []


# -- which GPUs there are --------------------------------------------------------------------------------------------


def test_gpus_in_order(install: Install) -> None:
    fake = install(Device("GPU-a", mig=error("NotSupported")), Device("GPU-b", mig=error("FunctionNotFound")))
    nvml = Nvml()
    expected = [Gpu(0, "GPU-a", "NVIDIA H200", 81920), Gpu(1, "GPU-b", "NVIDIA H200", 81920)]
    assert nvml.list_gpus() == expected
    assert nvml.list_gpus() == expected
    assert nvml.driver_version() == "580.65.06"
    assert fake.inits == 1


def test_mig_devices_come_after_all_gpus(install: Install) -> None:
    small = (18 * GIB, 17 * GIB)
    parts = [Device("MIG-a", small), None, Device("MIG-b", small)]
    install(Device("GPU-a", mig=1, parts=parts), Device("GPU-b"), Device("GPU-c", mig=1, parts=[None]))
    gpus = Nvml().list_gpus()
    assert [(gpu.index, gpu.uuid, gpu.parent) for gpu in gpus] == [
        (1, "GPU-b", None),
        (3, "MIG-a", "GPU-a"),
        (4, "MIG-b", "GPU-a"),
    ]
    assert [gpu.memory_mib for gpu in gpus] == [81920, 18432, 18432]
    assert [gpu.visible for gpu in gpus] == ["1", "MIG-a", "MIG-b"]


@pytest.mark.parametrize("name", ["LibraryNotFound", "DriverNotLoaded"])
async def test_without_a_driver_there_are_none(install: Install, name: str) -> None:
    fake = install(Device("GPU-a"))
    fake.no_init = error(name)
    nvml = Nvml()
    assert nvml.list_gpus() == []
    assert nvml.driver_version() is None
    with pytest.raises(StateError, match="no NVIDIA driver"):
        nvml.memory("GPU-a")
    fake.no_init = None
    assert len(nvml.list_gpus()) == 1, "loaded since"


def test_a_driver_that_does_not_work(install: Install) -> None:
    install().no_init = error("LibRmVersionMismatch")
    for ask in (Nvml().list_gpus, Nvml().driver_version, lambda: Nvml().memory("GPU-a")):
        with pytest.raises(StateError, match=r"does not answer: .*mismatch.*`nvidia-smi` may say more"):
            ask()


def test_a_gpu_that_fell_off_the_bus_is_left_out(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install(Device("GPU-a", lost=error("GpuIsLost")), Device("GPU-b"), Device("GPU-c", memory=error("Unknown")))
    with caplog.at_level(logging.WARNING):
        assert [gpu.uuid for gpu in Nvml().list_gpus()] == ["GPU-b"]
    assert "GPU 0 is left out: GPU is lost" in caplog.text
    assert "GPU 2 is left out" in caplog.text


def test_no_gpu_works(install: Install) -> None:
    install(Device("GPU-a", lost=error("GpuIsLost")))
    with pytest.raises(StateError, match="GPU is lost"):
        Nvml().list_gpus()


# -- their memory ----------------------------------------------------------------------------------------------------


def test_processes_of_both_kinds_are_merged(install: Install) -> None:
    fake = install(Device("GPU-a", compute=[(30, None), (10, 2 * GIB), (20, GIB)], graphics=[(20, GIB), (30, GIB)]))
    fake.names = {10: "/usr/bin/python3", 20: "VLLM::EngineCore", 30: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "")}
    assert Nvml().memory("GPU-a") == MemoryUse(
        81920,
        80896,
        (GpuProcess(10, 2048, "python3"), GpuProcess(20, 1024, "VLLM::EngineCore"), GpuProcess(30, 1024, "")),
    )


def test_what_nvml_does_not_tell(install: Install) -> None:
    part = Device("MIG-a", (GIB, GIB >> 1), compute=[(10, None)], graphics=error("NotSupported"))
    hidden = Device("GPU-b", compute=error("NoPermission"), graphics=error("NotSupported"))
    install(Device("GPU-a", mig=1, parts=[part]), hidden)
    assert Nvml().memory("MIG-a") == MemoryUse(1024, 512, (GpuProcess(10, None, ""),))
    assert Nvml().memory("GPU-b").processes == ()


def test_a_gpu_that_shares_the_host_s_memory(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Device("GPU-a", memory=error("NotSupported")))
    monkeypatch.setattr(host_memory, "available_mib", lambda: 777)
    assert [gpu.memory_mib for gpu in Nvml().list_gpus()] == [host_memory.total_mib()]
    assert Nvml().memory("GPU-a").free_mib == 777


def test_memory_that_cannot_be_told(install: Install) -> None:
    install(Device("GPU-a", memory=error("GpuIsLost")))
    with pytest.raises(StateError, match=r"GPU-a: .*GPU is lost"):
        Nvml().memory("GPU-a")
    with pytest.raises(StateError, match=r"GPU-x: .*Not Found"):
        Nvml().memory("GPU-x")


# -- a driver that hangs ---------------------------------------------------------------------------------------------


def drivers() -> int:
    return sum(thread.name == "nvidia-driver" for thread in threading.enumerate())


async def test_a_hanging_driver_costs_one_thread(install: Install) -> None:
    fake = install(Device("GPU-a"))
    before = drivers()
    gpus = NvidiaGpus(Nvml(), seconds=0.2)
    await gpus.find(None)
    fake.gate.clear()
    with pytest.raises(StateError, match=r"does not answer within 0\.2 s; `nvidia-smi` may say more"):
        await gpus.memory("GPU-a")
    for _ in range(20):
        with pytest.raises(StateError, match="does not answer"):
            await gpus.memory("GPU-a")
    assert gpus._driver._calls.empty(), "refused, not left to wait"
    assert fake.calls == 1
    assert drivers() == before + 1
    fake.gate.set()
    end = time.monotonic() + SECONDS
    while True:
        try:
            use = await gpus.memory("GPU-a")
            break
        except StateError:
            assert time.monotonic() < end, "the driver answers again and is not asked"
            await asyncio.sleep(0.01)
    assert use.total_mib == 81920


async def test_callers_behind_a_hanging_call_are_not_asked_for_later(install: Install) -> None:
    fake = install(Device("GPU-a"))
    gpus = NvidiaGpus(Nvml(), seconds=0.2)
    await gpus.find(None)
    fake.gate.clear()
    answers = await asyncio.gather(*(gpus.memory("GPU-a") for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [StateError] * 5
    fake.gate.set()
    driver = gpus._driver
    end = time.monotonic() + SECONDS
    while driver._late is not None and not driver._late.done():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    await gpus.memory("GPU-a")
    assert fake.calls == 2


async def test_calls_at_the_same_time_all_get_their_answer() -> None:
    driver = Driver()
    assert await asyncio.gather(*(driver.call(pow, number, 2) for number in range(50))) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        await driver.call(divmod, 1, 0)
    assert await driver.call(int) == 0


# -- which of them this daemon uses ----------------------------------------------------------------------------------


async def test_cuda_visible_devices_holds_for_the_daemon(install: Install, tmp_path: Path) -> None:
    install(Device("GPU-a"), Device("GPU-b"), Device("GPU-c"))
    found = await find_gpus(Settings(), tmp_path, {"CUDA_VISIBLE_DEVICES": "2,0"})
    assert [gpu.index for gpu in found.list()] == [2, 0]
    assert (await found.memory("GPU-c")).total_mib == 81920
    assert len((await find_gpus(Settings(), tmp_path, {})).list()) == 3
    assert list(tmp_path.iterdir()) == []


async def test_mock_gpus_where_the_settings_say_so(tmp_path: Path) -> None:
    settings = Settings(mock_gpus=True, mock_gpu_count=3)
    found = await find_gpus(settings, tmp_path, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert found.list() == (describe_mock(1),)
    assert len((await find_gpus(settings, tmp_path, {})).list()) == 3


# -- waiting for memory ----------------------------------------------------------------------------------------------


def hold(folder: Path, index: int, mib: int, pid: int | None = None) -> Path:
    file = folder / str(index) / str(pid or os.getpid())
    file.write_text(str(mib))
    return file


async def nobody() -> Mapping[int, str]:
    return {}


async def test_memory_that_is_free(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path, 2, 1000)
    hold(tmp_path, 1, 600)
    assert await wait_for_memory(gpus, {"GPU-0": 1000, "GPU-1": 1}, 0, nobody) == {"GPU-0": 1000, "GPU-1": 400}
    assert await wait_for_memory(gpus, {}, 0, nobody) == {}


async def test_memory_that_becomes_free(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path, 2, 1000)
    file = hold(tmp_path, 1, 600)
    waiting = asyncio.ensure_future(wait_for_memory(gpus, {"GPU-0": 500, "GPU-1": 500}, SECONDS, nobody))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    file.unlink()
    assert await waiting == {"GPU-0": 1000, "GPU-1": 1000}


async def test_who_holds_the_memory_is_named(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path, 2, 1000)
    hold(tmp_path, 1, 600)
    hold(tmp_path, 1, 300, os.getppid())

    async def owners() -> Mapping[int, str]:
        return {os.getpid(): "b"}

    sentence = await wait_for_memory(gpus, {"GPU-0": 500, "GPU-1": 500}, 0.05, owners)
    assert isinstance(sentence, str)
    assert sentence.startswith("GPU 1 (GPU-1) has 100 MiB free of the 500 MiB needed; the rest is held by ")
    assert f"instance 'b' (600 MiB), process {os.getppid()} (" in sentence
    assert sentence.endswith(f"of no instance (300 MiB); stop 'b' or put it to sleep, or `kill {os.getppid()}`")


class Told:
    """GPUs with memory as given."""

    def __init__(self, gpu: Gpu, use: MemoryUse | StateError) -> None:
        self.gpu, self.use = gpu, use

    def list(self) -> tuple[Gpu, ...]:
        return (self.gpu,)

    async def memory(self, uuid: str) -> MemoryUse:
        use: MemoryUse = value(self.use)
        return use


PART = Gpu(1, "MIG-a", "part", 1000, "GPU-a")


async def test_holders_of_unknown_amounts(tmp_path: Path) -> None:
    processes = (GpuProcess(7, None, ""), GpuProcess(8, None, "python3"), GpuProcess(9, 10, "x"))

    async def owners() -> Mapping[int, str]:
        return {8: "a", 9: "a"}

    sentence = await wait_for_memory(Told(PART, MemoryUse(1000, 100, processes)), {"MIG-a": 500}, 0, owners)
    assert sentence == (
        "MIG device MIG-a has 100 MiB free of the 500 MiB needed; the rest is held by instance 'a', process 7 of no "
        "instance; stop 'a' or put it to sleep, or `kill 7`"
    )


async def test_holders_that_nobody_tells() -> None:
    sentence = await wait_for_memory(Told(PART, MemoryUse(1000, 100)), {"MIG-a": 500}, 0, nobody)
    assert isinstance(sentence, str)
    assert "who holds the other 900 MiB, `nvidia-smi` on the host" in sentence


async def test_more_than_a_gpu_has_is_not_waited_for() -> None:
    waiting = wait_for_memory(Told(PART, MemoryUse(1000, 100)), {"MIG-a": 2000}, 3600, nobody)
    sentence = await asyncio.wait_for(waiting, SECONDS)
    assert isinstance(sentence, str)
    assert sentence.startswith("MIG device MIG-a has 1000 MiB in all, and 2000 MiB are needed; choose a larger GPU")


async def test_a_driver_that_does_not_answer_is_not_waited_for() -> None:
    waiting = wait_for_memory(Told(PART, StateError("no answer")), {"MIG-a": 1}, 3600, nobody)
    assert await asyncio.wait_for(waiting, SECONDS) == "no answer"


def test_foreign_processes() -> None:
    use = MemoryUse(2, 0, (GpuProcess(7, 1, "a"), GpuProcess(8, 1, "b")))
    assert foreign_processes(use, {7}.__contains__) == [use.processes[1]]
