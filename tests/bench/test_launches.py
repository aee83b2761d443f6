"""The course of ``launches``, in small, and its tables."""

from __future__ import annotations

import pytest

from bench import launches
from bench.common import Options, Result
from bench.launches import Log, Stop
from tests.bench.conftest import Silent


def test_status_is_asked_while_the_driver_hangs(options: Options, progress: Silent) -> None:
    result = Result("", "")
    launches.measure_status(options, progress, 1, 0.3, result)
    measured = result.data["status"]
    assert len(measured["calm"]) > 10
    assert len(measured["hanging"]) > 10
    assert None not in measured["hanging"]


def test_stops_are_measured_alone_and_together(
    options: Options, progress: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "STOPS", {kind: launches.STOPS[kind] for kind in ("ready", "loading")})
    result = Result("", "")
    launches.measure_stops(options, progress, 1, result)
    measured = result.data["stops"]
    for kind in ("ready", "loading"):
        assert [len(measured[name][kind]) for name in ("alone", "together")] == [1, launches.AT_ONCE]
        assert all((one["state"], one["left"]) == ("stopped", 0) for one in measured["together"][kind])


def test_the_ends_of_logs_are_read(options: Options, progress: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "SETTLE_SECONDS", 0.0)
    result = Result("", "")
    launches.measure_logs(options, progress, 3, (200_000, 2_000_000), result)
    measured = result.data["logs"]
    assert [measured[name]["size"] for name in ("small", "large")] == [200_000, 2_000_000]
    assert all(len(measured[name]["seconds"]) == 3 for name in ("small", "large"))
    assert result.tables[0].rows[1][0] == "2 MB"


@pytest.mark.parametrize(("slowest", "reached"), [(0.049, True), (0.051, False), (None, False)])
def test_one_status_in_a_hundred_may_be_slow(slowest: float | None, reached: bool) -> None:
    result = Result("", "")
    launches.report_status([0.001] * 100, [*[0.001] * 98, slowest, slowest], result)
    assert result.goals[0].reached is reached


@pytest.mark.parametrize(
    ("stop", "reached"),
    [
        (Stop(4.9, "stopped", 0), [True, True]),
        (Stop(5.1, "stopped", 0), [False, True]),
        (Stop(4.9, "stopping", 0), [True, False]),
        (Stop(4.9, "stopped", 1), [True, False]),
    ],
)
def test_every_single_stop_must_come_in_time_and_be_whole(stop: Stop, reached: list[bool]) -> None:
    result = Result("", "")
    quick = Stop(0.01, "stopped", 0)
    launches.report_stops(
        {"ready": [quick], "stubborn": [quick]}, {"ready": [quick], "stubborn": [quick, stop]}, result
    )
    assert [goal.reached for goal in result.goals] == reached
    assert result.tables[0].rows[1][-1] == str(stop.left)


@pytest.mark.parametrize(
    ("seconds", "rss", "reached"),
    [(0.0014, 60, [True, True]), (0.0016, 60, [False, True]), (0.001, 70, [True, False])],
)
def test_a_long_log_may_cost_neither_time_nor_memory(seconds: float, rss: int, reached: list[bool]) -> None:
    result = Result("", "")
    small, large = Log(1_000_000, [0.001] * 3, 58 << 20), Log(100_000_000, [seconds] * 3, rss << 20)
    launches.report_logs(small, large, result)
    assert [goal.reached for goal in result.goals] == reached
