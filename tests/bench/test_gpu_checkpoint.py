"""The whole course of ``gpu-checkpoint``, with fakes of NVML, the driver and PyTorch; the processes are real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_checkpoint
from bench.common import BenchError, Options, UnavailableError
from bench.gpu_common import Device
from tests.bench.conftest import Silent

GIB = 1024


class Status(IntEnum):
    """As ``CUresult``."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


@dataclass
class LockArguments:
    """As ``CUcheckpointLockArgs``."""

    timeoutMs: int = 0


class FakeDriver:
    """As ``cuda.bindings.driver``, on a mock GPU: a suspended process holds nothing there.

    Args:
        place: the folder of the mock GPU.
    """

    CUcheckpointLockArgs = LockArguments
    RUNNING, LOCKED, CHECKPOINTED = 0, 1, 2

    def __init__(self, place: Path) -> None:
        self.place = place
        self.calls: list[tuple[str, int]] = []
        self.states: dict[int, int] = {}
        self.held: dict[int, str] = {}
        self.refuses = ""
        self.spoils = False

    def cuInit(self, flags: int) -> tuple[Status]:
        assert flags == 0
        return (Status.CUDA_SUCCESS,)

    def cuCheckpointProcessLock(self, pid: int, arguments: LockArguments) -> tuple[Status]:
        assert arguments.timeoutMs > 0
        return self._change("Lock", pid, self.RUNNING, self.LOCKED)

    def cuCheckpointProcessCheckpoint(self, pid: int, arguments: None) -> tuple[Status]:
        self.held[pid] = (self.place / str(pid)).read_text()
        (self.place / str(pid)).write_text("0")
        return self._change("Checkpoint", pid, self.LOCKED, self.CHECKPOINTED)

    def cuCheckpointProcessRestore(self, pid: int, arguments: None) -> tuple[Status]:
        (self.place / str(pid)).write_text(self.held[pid])
        if self.spoils:
            (self.place / "changed").touch()
        return self._change("Restore", pid, self.CHECKPOINTED, self.LOCKED)

    def cuCheckpointProcessUnlock(self, pid: int, arguments: None) -> tuple[Status]:
        return self._change("Unlock", pid, self.LOCKED, self.RUNNING)

    def cuCheckpointProcessGetState(self, pid: int) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self.states.get(pid, self.RUNNING)

    def _change(self, name: str, pid: int, before: int, after: int) -> tuple[Status]:
        self.calls.append((name, pid))
        if name == self.refuses:
            return (Status.CUDA_ERROR_NOT_SUPPORTED,)
        assert self.states.get(pid, self.RUNNING) == before
        self.states[pid] = after
        return (Status.CUDA_SUCCESS,)


@pytest.fixture
def driver(device: Device, state: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    place = state / "mock-gpus" / "0"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("fake_torch")))
    monkeypatch.setenv("MOCK_GPU", str(place))
    return FakeDriver(place)


def test_processes_of_each_size_and_a_tree_are_suspended_and_resumed(
    options: Options, progress: Silent, device: Device, driver: FakeDriver
) -> None:
    result = gpu_checkpoint.measure(options, progress, device, driver)
    assert progress.steps == ["1 GiB", "4 GiB", "a tree of two, 1 GiB each"]
    held = {"1 GiB": GIB, "4 GiB": 4 * GIB, "a tree of two, 1 GiB each": 2 * GIB}
    for name, mib in held.items():
        assert result.data[name]["problem"] == ""
        assert [(one["awake_mib"], one["asleep_mib"]) for one in result.data[name]["cycles"]] == [(mib, 0)] * 2
    assert [row[-1] for row in result.tables[0].rows] == ["as before"] * 3
    assert all(goal.reached for goal in result.goals)
    assert device.used_mib() == 0


def test_a_tree_is_locked_as_a_whole_before_any_of_it_is_moved(
    options: Options, device: Device, driver: FakeDriver
) -> None:
    case = gpu_checkpoint.Case("tree", (GIB, GIB), [])
    gpu_checkpoint.measure_case(options, device, gpu_checkpoint.Checkpoints(driver), case, 1)
    parent, child = driver.states
    steps = ("Lock", "Checkpoint", "Restore", "Unlock")
    assert driver.calls == [(step, pid) for step in steps for pid in (parent, child)]


def test_numbers_that_are_not_as_before_are_found(
    options: Options, progress: Silent, device: Device, driver: FakeDriver
) -> None:
    driver.spoils = True
    result = gpu_checkpoint.measure(options, progress, device, driver)
    assert result.tables[0].rows[0][-1] == "**changed**"
    assert not result.goals[0].reached


@pytest.mark.parametrize("step", ["Lock", "Checkpoint", "Restore", "Unlock"])
def test_a_step_that_the_driver_refuses_is_named_and_no_process_is_left(
    options: Options, progress: Silent, device: Device, driver: FakeDriver, step: str
) -> None:
    driver.refuses = step
    result = gpu_checkpoint.measure(options, progress, device, driver)
    assert f"1 GiB: cuCheckpointProcess{step}: CUDA_ERROR_NOT_SUPPORTED." in result.tables[0].note
    assert result.tables[0].rows[0] == ["1 GiB", "0", "", "", "", "", "", "**not resumed**"]
    assert not result.goals[0].reached
    assert device.used_mib() == 0


def test_a_call_that_hangs_is_given_up(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(gpu_checkpoint, "CALL_SECONDS", 0.05)
    monkeypatch.setattr(driver, "cuCheckpointProcessUnlock", lambda pid, arguments: released.wait(10))
    with pytest.raises(BenchError, match="cuCheckpointProcessUnlock did not return"):
        gpu_checkpoint.Checkpoints(driver).unlock(1)
    released.set()


def test_a_state_that_was_not_reached_is_an_error(driver: FakeDriver) -> None:
    with pytest.raises(BenchError, match="process 7 in state 0, not 2"):
        gpu_checkpoint.Checkpoints(driver).expect(7, gpu_checkpoint.CHECKPOINTED)


def test_sizes_that_do_not_fit_are_left_out(device: Device) -> None:
    assert gpu_checkpoint.fitting((GIB, 4 * GIB, 16 * GIB), device) == [GIB, 4 * GIB]
    with pytest.raises(BenchError, match="too little memory"):
        gpu_checkpoint.fitting((4 * GIB,), device)


class NoModule:
    """Stands for an import of a package that is not there, or of an old one."""

    @staticmethod
    def missing(name: str) -> Any:
        raise ImportError(name)

    @staticmethod
    def old(name: str) -> Any:
        return object()


@pytest.mark.parametrize(("find", "words"), [(NoModule.missing, "not installed"), (NoModule.old, "too old")])
def test_bindings_that_cannot_do_it_are_named(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[str], Any], words: str
) -> None:
    monkeypatch.setattr("importlib.import_module", find)
    with pytest.raises(UnavailableError, match=words):
        gpu_checkpoint.load_driver()
