"""Mock GPUs: their memory is held by files, as long as the process of a file's name lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bullpen.core.devices import GpuProcess
from bullpen.errors import StateError
from bullpen.node.mock_gpus import MockGpus
from bullpen.sim.gpus import MockGpus as Simulated
from tests.node.conftest import SECONDS, is_alive, wait_for


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed; its end is not read before the test's."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait(SECONDS)


async def test_a_folder_for_each(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path / "a" / "b", 2, 1000)
    assert [(gpu.index, gpu.uuid, gpu.memory_mib) for gpu in gpus.list()] == [(0, "GPU-0", 1000), (1, "GPU-1", 1000)]
    assert sorted(str(path.relative_to(gpus.folder)) for path in gpus.folder.rglob("*")) == [
        "0",
        "0/total",
        "1",
        "1/total",
    ]
    assert (await gpus.memory("GPU-1")).free_mib == 1000


async def test_a_living_process_holds_memory(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    (tmp_path / "0" / str(sleeper.pid)).write_text("300\n")
    (tmp_path / "0" / str(os.getpid())).write_text("200")
    use = await gpus.memory("GPU-0")
    assert (use.total_mib, use.free_mib) == (1000, 500)
    assert {(process.pid, process.mib) for process in use.processes} == {(sleeper.pid, 300), (os.getpid(), 200)}
    assert all(process.name for process in use.processes)


async def test_what_the_simulator_holds(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path, 2, 1000)
    simulated = Simulated([tmp_path / "1"])
    simulated.hold(300)
    assert ((await gpus.memory("GPU-0")).free_mib, (await gpus.memory("GPU-1")).free_mib) == (1000, 700)
    with pytest.raises(RuntimeError, match="out of memory"):
        simulated.hold(1001)
    simulated.release()
    assert (await gpus.memory("GPU-1")).free_mib == 1000


async def test_a_zombie_holds_none(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    (tmp_path / "0" / str(sleeper.pid)).write_text("300")
    assert (await gpus.memory("GPU-0")).free_mib == 700
    os.kill(sleeper.pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(sleeper.pid))
    assert os.path.exists(f"/proc/{sleeper.pid}"), "not read yet"
    assert (await gpus.memory("GPU-0")).processes == ()


async def test_nor_does_one_that_is_gone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    sleeper.kill()
    sleeper.wait(SECONDS)
    (tmp_path / "0" / str(sleeper.pid)).write_text("300")
    assert (await gpus.memory("GPU-0")).processes == ()


async def test_nor_does_a_later_process_of_the_same_number(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    file = tmp_path / "0" / str(os.getpid())
    file.write_text("300")
    assert (await gpus.memory("GPU-0")).free_mib == 700
    os.utime(file, (1, 1))
    assert (await gpus.memory("GPU-0")).free_mib == 1000


@pytest.mark.parametrize("text", [b"", b"x", b"-5", b"0", b"1.5", b"\xff", None])
async def test_text_that_is_no_number_holds_none(tmp_path: Path, text: bytes | None) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    file = tmp_path / "0" / str(os.getpid())
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text)
    assert (await gpus.memory("GPU-0")).free_mib == 1000


@pytest.mark.parametrize("name", ["x", "12.tmp", "²", "1" * 30, ".5"])
async def test_a_name_that_is_no_pid_holds_none(tmp_path: Path, name: str) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    (tmp_path / "0" / name).write_text("300")
    assert (await gpus.memory("GPU-0")).free_mib == 1000


async def test_more_than_there_is_leaves_nothing(tmp_path: Path) -> None:
    gpus = MockGpus(tmp_path, 1, 1000)
    (tmp_path / "0" / str(os.getpid())).write_text("3000")
    assert (await gpus.memory("GPU-0")).free_mib == 0


async def test_a_new_daemon_keeps_what_living_processes_hold(tmp_path: Path) -> None:
    MockGpus(tmp_path, 1, 1000)
    own, gone, other = (tmp_path / "0" / name for name in (str(os.getpid()), str(2**22 + 1), "note"))
    for file in (own, gone, other):
        file.write_text("300")
    (process,) = MockGpus(tmp_path, 1, 2000).read("GPU-0").processes
    assert isinstance(process, GpuProcess)
    assert (process.pid, process.mib) == (os.getpid(), 300)
    assert (own.exists(), gone.exists(), other.exists()) == (True, False, True)
    assert MockGpus(tmp_path, 1, 2000).read("GPU-0").total_mib == 2000


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="mock GPUs cannot be kept in"):
        MockGpus(tmp_path / "file" / "x", 1)
    gpus = MockGpus(tmp_path / "gpus", 1)
    (tmp_path / "gpus" / "0" / "total").unlink()
    with pytest.raises(StateError, match=r"GPU-0 in .* cannot be read"):
        await gpus.memory("GPU-0")
    with pytest.raises(StateError, match="no mock GPU GPU-5"):
        await gpus.memory("GPU-5")
