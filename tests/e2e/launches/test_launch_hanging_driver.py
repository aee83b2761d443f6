"""A driver that hangs, and a launch that loads: nothing that callers ask of launches waits for either."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launches.calls import launch, loading, log_of, reach, status, stop
from tests.e2e.launches.nvml import Driver
from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call, trees

pytestmark = pytest.mark.slow  # the driver is given seconds to answer
SLOW = {"BULLPEN_SIM_START_SECONDS": "600"}
QUICK = {"BULLPEN_SIM_START_SECONDS": 0}


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """A driver that answers until it is told not to."""
    return Driver(tmp_path / "driver")


@pytest.fixture
def daemon(start_here: Callable[..., Daemon], driver: Driver) -> Daemon:
    """A daemon with that driver's GPUs, whose launches load for as long as a test lasts; see `quick`."""
    return start_here(environment={**driver.environment, **SLOW}).wait_warm()


def quick(daemon: Daemon, name: str, gpu: int) -> dict[str, Any]:
    """A launch that is ready at once: one that has variables of its own."""
    daemon.create(instance_id=name, gpu_uuids=[f"GPU-{gpu}"], env_vars=QUICK)
    return reach(daemon, name, "ready")


def hang_up_on(daemon: Daemon, driver: Driver, pool: ThreadPoolExecutor) -> list[Future[tuple[int, Any]]]:
    """Have both of the daemon's ways to the driver wait for it: what calls are under way."""
    paths = ("/stats", "/v2/vllm/gpus")
    asked = [pool.submit(call, f"{daemon.url}{path}", seconds=60.0) for path in paths]
    driver.wait_for_call(len(paths))
    return asked


def test_nothing_waits_for_the_driver(daemon: Daemon, driver: Driver) -> None:
    """Every call is answered while the driver hangs and a launch loads."""
    _, stats = call(f"{daemon.url}/stats")
    assert (stats["gpu_count"], stats["nvidia_smi_error"]) == (3, None)
    ready = quick(daemon, "ready", 0)
    slow = loading(daemon, launch(daemon, gpu_ids=[1])["launch_id"])["launch_id"]
    with ThreadPoolExecutor(2) as pool, driver.hangs():
        asked = hang_up_on(daemon, driver, pool)
        assert status(daemon, "ready") == ready
        assert status(daemon, slow)["state"] == "bootstrapping"
        assert [one["launch_id"] for one in call(f"{daemon.url}/launch")[1]] == ["ready", slow]
        assert "simulator" in log_of(daemon, slow)
        code, answer = call(f"{daemon.url}/launch", "POST", {"model": "m"})
        assert (code, answer["detail"]) == (409, f"Requested GPUs are in use (gpu 0 -> ready, gpu 1 -> {slow})")
        third = launch(daemon, gpu_ids=[2])["launch_id"]
        loading(daemon, third)
        for name in (third, slow, "ready"):
            assert stop(daemon, name)["state"] == "stopped"
        assert not trees(daemon.state_dir)
        assert quick(daemon, "again", 0)["state"] == "ready"
        assert stop(daemon, "again")["state"] == "stopped"
        assert call(f"{daemon.url}/launch")[1] == []
        (_, stats), (_, gpus) = (one.result(60) for one in asked)
        assert "the NVIDIA driver does not answer within 5 s" in stats["nvidia_smi_error"]
        assert (stats["gpu_count"], stats["gpus"]) == (0, [])
        assert stats["memory_total_bytes"] > 0 and stats["host_memory_error"] is None
        assert {"does not answer" in str(gpu["problem"]) for gpu in gpus["gpus"]} == {True}
        assert "does not answer" in call(f"{daemon.url}/stats")[1]["nvidia_smi_error"], "and is not asked again"
        assert driver.calls == 2
    wait_until(lambda: call(f"{daemon.url}/stats")[1]["gpu_count"] == 3)


def test_a_launch_that_waits_for_memory_is_stopped(daemon: Daemon, driver: Driver) -> None:
    """One that names a share of the memory asks the driver before it starts; its stop does not wait for that."""
    body: dict[str, Any] = {"gpu_ids": [0], "extra_kwargs": {"gpu_memory_utilization": 0.5}}
    with driver.hangs():
        name = launch(daemon, **body)["launch_id"]
        driver.wait_for_call()
        assert status(daemon, name)["state"] == "bootstrapping"
        stopped = stop(daemon, name)
        assert (stopped["state"], stopped["error"], stopped["pid"]) == ("stopped", None, None)
        assert stop(daemon, name) == status(daemon, name) == stopped
        late = launch(daemon, gpu_ids=[1], extra_kwargs={"gpu_memory_utilization": 0.5})["launch_id"]
        failed = reach(daemon, late, "failed")
        assert "the NVIDIA driver does not answer" in failed["error"]
        assert call(f"{daemon.url}/launch")[1] == []
    assert loading(daemon, launch(daemon)["launch_id"])["gpu_ids"] == [0, 1, 2], "all GPUs are free"


def test_the_daemon_ends_although_the_driver_hangs(daemon: Daemon, driver: Driver) -> None:
    with ThreadPoolExecutor(2) as pool, driver.hangs():
        quick(daemon, "ready", 0)
        asked = hang_up_on(daemon, driver, pool)
        assert daemon.end() == 0, "".join(daemon.output)
        assert not trees(daemon.state_dir)
        assert [one.exception(60) is None or isinstance(one.exception(), OSError) for one in asked] == [True] * 2
