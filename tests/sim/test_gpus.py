"""What the simulator holds on mock GPUs, and what happens where that is more than there is."""

import os
import signal
from pathlib import Path

import pytest

from bullpen.sim.gpus import MockGpus, OutOfMemoryError, held_by_others
from bullpen.sim.memory import Memory
from tests.sim.simulator import Simulator, is_alive, wait_for

ARGUMENTS = ("m", "--host", "127.0.0.1", "--port", "0", "--enable-sleep-mode")


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    """Two mock GPUs without a limit."""
    for index in ("0", "1"):
        (tmp_path / "gpus" / index).mkdir(parents=True)
    return tmp_path / "gpus"


def environment(gpus: Path, **more: object) -> dict[str, object]:
    sizes = {"awake_mib": 1000, "asleep_mib": 50, "sleep_seconds": 0, "wake_seconds": 0}
    return {"BULLPEN_MOCK_GPU_DIR": gpus, "CUDA_VISIBLE_DEVICES": "0,1", **sizes, **more}


def held(gpus: Path, simulator: Simulator) -> list[int]:
    """What the engine child's file says on each GPU; -1 where it has none."""
    files = [gpus / index / str(simulator.engine_pid) for index in ("0", "1")]
    return [int(file.read_text()) if file.exists() else -1 for file in files]


def test_memory_through_sleep_and_wake(tmp_path: Path, gpus: Path) -> None:
    with Simulator.serving(tmp_path, "--enable-sleep-mode", **environment(gpus)) as simulator:
        assert held(gpus, simulator) == [1000, 1000]
        for path, expected in (
            ("/sleep?level=0", 1000),
            ("/wake_up", 1000),
            ("/sleep?level=1", 50),
            ("/wake_up?tags=weights", 500),
            ("/wake_up?tags=kv_cache", 1000),
            ("/sleep?level=2", 50),
            ("/wake_up", 1000),
        ):
            assert simulator.http.post(path).status_code == 200
            assert held(gpus, simulator) == [expected] * 2, path
        simulator.process.terminate()
        assert simulator.wait_ended() == 0
        wait_for("the files are gone", lambda: held(gpus, simulator) == [-1, -1])
        assert list(gpus.glob("*/*")) == []


def test_memory_while_starting(tmp_path: Path, gpus: Path) -> None:
    with Simulator(tmp_path, *ARGUMENTS, **environment(gpus, start_seconds=2)) as simulator:
        wait_for("half of it is there", lambda: held(gpus, simulator) == [500, 500])
        assert "init engine" not in simulator.log
        wait_for("all of it is there", lambda: held(gpus, simulator) == [1000, 1000])


def test_without_sleep_mode_nothing_is_given_back(tmp_path: Path, gpus: Path) -> None:
    with Simulator.serving(tmp_path, **environment(gpus)) as simulator:
        assert simulator.http.post("/sleep?level=2").status_code == 200
        assert held(gpus, simulator) == [1000, 1000]


def test_one_gpu_of_two_and_none(tmp_path: Path, gpus: Path) -> None:
    with Simulator.serving(tmp_path, **environment(gpus, CUDA_VISIBLE_DEVICES="1")) as simulator:
        assert held(gpus, simulator) == [-1, 1000]
    for hidden in ({"CUDA_VISIBLE_DEVICES": ""}, {"BULLPEN_MOCK_GPU_DIR": ""}):
        with Simulator.serving(tmp_path, **environment(gpus, **hidden)) as simulator:
            assert held(gpus, simulator) == [-1, -1]


def test_a_server_that_is_killed_leaves_no_file_and_a_killed_engine_child_one_that_does_not_count(
    tmp_path: Path, gpus: Path
) -> None:
    with Simulator.serving(tmp_path, **environment(gpus)) as simulator:
        simulator.process.kill()
        wait_for("the files are gone", lambda: held(gpus, simulator) == [-1, -1])
    with Simulator.serving(tmp_path, **environment(gpus)) as simulator:
        os.kill(simulator.engine_pid, signal.SIGKILL)
        wait_for("it has ended", lambda: not is_alive(simulator.engine_pid))
        assert held(gpus, simulator) == [1000, 1000]
        assert held_by_others(gpus / "0") == 0


def test_too_little_memory_to_start(tmp_path: Path, gpus: Path) -> None:
    (gpus / "1" / "total").write_text("1500")
    with Simulator.serving(tmp_path, *ARGUMENTS, **environment(gpus, CUDA_VISIBLE_DEVICES="1")) as first:
        assert held_by_others(gpus / "1") == 1000
        with Simulator(tmp_path, *ARGUMENTS, **environment(gpus)) as second:
            assert second.wait_ended() == 1
            assert "Traceback (most recent call last):" in second.log
            expected = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 500.00 MiB. GPU 1 has a total "
            assert expected + "capacity of 1500.00 MiB of which 0.00 MiB is free." in second.log
            assert "Engine core initialization failed." in second.log
            assert held(gpus, second) == [-1, -1]
        assert first.http.post("/sleep").status_code == 200
        with Simulator.serving(tmp_path, *ARGUMENTS, **environment(gpus)) as third:
            assert held(gpus, third) == [1000, 1000]


def test_too_little_memory_to_wake(tmp_path: Path, gpus: Path) -> None:
    (gpus / "0" / "total").write_text("1600\n")
    with Simulator.serving(tmp_path, "--enable-sleep-mode", **environment(gpus)) as first:
        assert first.http.post("/sleep").status_code == 200
        with Simulator.serving(tmp_path, "--enable-sleep-mode", **environment(gpus)) as second:
            answer = first.http.post("/wake_up")
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
            assert "CUDA Error: out of memory" in answer.json()["error"]["message"]
            assert held(gpus, first) == [50, 50]
            assert first.http.post("/wake_up?tags=weights").status_code == 200
            assert first.http.post("/wake_up?tags=kv_cache").status_code == 500
            assert first.http.get("/is_sleeping").json() == {"is_sleeping": True}
            assert held(gpus, first) == [500, 500]
            assert second.http.post("/sleep").status_code == 200
        assert first.http.post("/wake_up").json()["status"] == "awake"
        assert held(gpus, first) == [1000, 1000]


def test_a_second_gpu_without_memory_leaves_the_first_as_it_was(gpus: Path) -> None:
    (gpus / "1" / "total").write_text("100")
    mine = MockGpus([gpus / "0", gpus / "1"])
    mine.hold(80)
    with pytest.raises(OutOfMemoryError):
        mine.hold(120)
    assert [(gpus / index / str(os.getpid())).read_text() for index in ("0", "1")] == ["80\n", "80\n"]
    mine.hold(100)
    mine.release()
    assert not list(gpus.glob("*/[0-9]*"))


@pytest.mark.parametrize("pooled", [False, True])
def test_memory_never_holds_less_than_asleep_or_more_than_awake(pooled: bool) -> None:
    awake = Memory(pooled)
    asleep = awake.slept(1)
    assert asleep
    half = asleep.woken(["weights"])
    assert half
    sizes = [memory.held(100, 80) for memory in (awake, asleep, half)]
    assert sizes == ([100, 80, 80] if pooled else [100, 100, 100])
