"""The whole course of ``gpu-sleep``, with the simulator on a mock GPU where it takes real vLLM on a real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import docs, gpu_sleep
from bench.common import Options
from bench.gpu_common import Device
from tests.bench.conftest import GPU_MIB, Silent

AWAKE_MIB, ASLEEP_MIB = 1024, 64


def simulator(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "bullpen.sim", *arguments]


@pytest.fixture
def bed(device: Device, state: Path) -> gpu_sleep.Bed:
    settings = {"mock_gpus": True, "mock_gpu_count": 1, "mock_gpu_memory": GPU_MIB}
    return gpu_sleep.Bed(device, "sim", simulator, state, settings, {"BULLPEN_MOCK_GPU_DIR": str(state / "mock-gpus")})


def test_each_model_is_started_slept_and_woken_and_two_are_swapped(
    options: Options, progress: Silent, bed: gpu_sleep.Bed
) -> None:
    result = gpu_sleep.measure(options, progress, bed, ("m", "n"))
    assert len(progress.steps) == progress.expected
    assert [one["model"] for one in result.data["models"]] == ["m", "n"]
    for one in result.data["models"]:
        assert one["problems"] == []
        assert [start["gpu_mib"] for start in (*one["cold"], *one["warm"])] == [AWAKE_MIB] * 2
        for level in gpu_sleep.LEVELS:
            assert [(nap["awake_mib"], nap["asleep_mib"]) for nap in one["naps"][level]] == [
                (AWAKE_MIB, ASLEEP_MIB)
            ] * 2
            assert all(nap["same"] and nap["first_token"] > nap["wake"] > 0 for nap in one["naps"][level])
    assert len(result.data["swaps"]) == 4
    assert all(one["same"] and one["first_token"] > one["reply"] > 0 for one in result.data["swaps"])
    assert [table.title for table in result.tables] == [
        "To the first token",
        "Sleep and wake",
        "Swap of m and n, level 1",
    ]
    assert [row[0] for row in result.tables[1].rows] == ["m: level 1", "m: level 2", "n: level 1", "n: level 2"]
    assert all(goal.reached for goal in result.goals)
    assert "mock (8 GiB), NVIDIA driver 575.51.03" in result.method
    assert bed.device.used_mib() == 0


def test_what_does_not_work_is_said_and_the_rest_is_measured(
    options: Options, progress: Silent, bed: gpu_sleep.Bed
) -> None:
    broken = gpu_sleep.Bed(
        bed.device, "sim", lambda _: [sys.executable, "-c", "raise SystemExit(3)"], bed.state, bed.settings
    )
    result = gpu_sleep.measure(options, progress, broken, ("m",))
    (one,) = result.data["models"]
    assert one["cold"] == []
    assert len(one["warm"]) == 1
    assert len(one["naps"][2]) == 2
    assert "has ended" in result.tables[0].note
    assert not result.goals[0].reached
    assert result.tables[0].rows[0][3] == ""
    assert "| m: level 2 |" in docs.markdown_table(result.tables[1].columns, result.tables[1].rows)
