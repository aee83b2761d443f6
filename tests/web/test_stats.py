"""What is said of the host: memory, load, GPUs, and drivers that do not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bullpen.node.host_stats import GpuReading, HostStats
from bullpen.node.resources import Resources
from bullpen.web import launch_models
from tests.support.daemon import Daemon

NUMBERS = ("load_avg_1m", "load_avg_5m", "load_avg_15m", "memory_total_bytes", "memory_utilization_percent")


def nobody(uuid: str) -> list[str]:
    return []


def without_mocks(read: Callable[[], list[GpuReading]], seconds: float = 5.0) -> HostStats:
    return HostStats(cast(Resources, SimpleNamespace(gpus=None)), seconds, read)


def test_stats_of_this_host(shared: Daemon) -> None:
    launch = shared.http.post("/launch", json={"model": "m", "gpu_ids": [1]}).json()["launch_id"]
    shared.wait_state(launch, "ready")
    stats = shared.http.get("/stats").json()
    launch_models.Stats.model_validate(stats, extra="forbid")
    assert datetime.fromisoformat(stats["collected_at"]).tzinfo is not None
    assert all(stats[name] > 0 for name in NUMBERS)
    assert stats["memory_used_bytes"] == stats["memory_total_bytes"] - stats["memory_available_bytes"]
    assert stats["host_memory_error"] is stats["nvidia_smi_error"] is None
    assert stats["gpu_count"] == len(stats["gpus"]) == 2
    idle, used = stats["gpus"]
    assert (idle["gpu_id"], idle["launch_ids"], idle["memory_used_mib"]) == (0, [], 0)
    assert (used["gpu_id"], used["uuid"], used["launch_ids"]) == (1, "GPU-1", [launch])
    assert used["memory_used_mib"] + used["memory_free_mib"] == used["memory_total_mib"]


def test_a_host_without_gpus_says_so(start_daemon: Callable[..., Daemon]) -> None:
    stats = start_daemon(mock_gpus=True, mock_gpu_count=0).http.get("/stats").json()
    assert (stats["gpu_count"], stats["gpus"]) == (0, [])
    assert "nvidia-smi is unavailable on this host" in stats["nvidia_smi_error"]


async def test_gpus_come_in_order() -> None:
    readings = [GpuReading(1, "GPU-b", "unknown"), GpuReading(0, None, "H200", power_draw_watts=3.5)]
    stats = await without_mocks(lambda: readings).read(lambda uuid: [f"on {uuid}"] if uuid else [])
    assert [(gpu["gpu_id"], gpu["launch_ids"]) for gpu in stats["gpus"]] == [(0, []), (1, ["on GPU-b"])]
    assert stats["gpus"][0]["power_draw_watts"] == 3.5


@pytest.fixture
def hung() -> Iterator[Callable[[], list[GpuReading]]]:
    """A driver that does not answer before the test is over."""
    over = threading.Event()

    def read() -> list[GpuReading]:
        over.wait(30)
        return []

    yield read
    over.set()


async def test_a_driver_that_hangs_holds_nothing_up(hung: Callable[[], list[GpuReading]]) -> None:
    host = without_mocks(hung, seconds=0.05)
    for _ in range(3):
        stats: dict[str, Any] = await host.read(nobody)
        assert (stats["gpu_count"], stats["gpus"]) == (0, [])
        assert "does not answer within 0.05 s" in stats["nvidia_smi_error"]
        assert stats["memory_total_bytes"] > 0
