"""The whole course of ``swap``, with the simulator where it takes real vLLM, and its tables."""

from __future__ import annotations

import pytest

from bench import swap
from bench.common import Options, Result
from tests.bench.conftest import Silent


def test_the_overhead_of_swaps_is_measured_in_turn_with_bare_calls(options: Options, progress: Silent) -> None:
    result = Result("", "")
    swap.measure_overhead(options, progress, 4, result)
    measured = result.data["overhead"]
    assert len(measured["swaps"]) == len(measured["bare"]) == 4
    least = 2 * swap.ENGINE_SECONDS
    assert all(seconds > least for seconds in measured["bare"])
    for one in measured["swaps"]:
        assert one["going_out"] > swap.ENGINE_SECONDS
        assert one["coming_in"] > swap.ENGINE_SECONDS
        assert one["seconds"] > one["going_out"] + one["coming_in"]


def test_swaps_by_an_emulated_sleep_are_measured_beside_forks(
    options: Options, progress: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "SPARE_SECONDS", 0.0)
    result = Result("", "")
    swap.measure_emulated(options, progress, 1, swap.Served.sim(), result)
    measured = result.data["emulated"]
    assert [one["model"] for one in measured["swaps"]] == ["m", "n"]
    assert [one["model"] for one in measured["alone"]] == ["n"]
    assert all(one["first_token"] > one["reply"] > 0 for one in (*measured["swaps"], *measured["alone"]))
    first_token, same = result.goals
    assert first_token.reached
    assert same.measured == "the same"


@pytest.mark.parametrize(("milliseconds", "reached"), [(59, True), (61, False)])
def test_what_the_engines_are_told_to_take_is_not_overhead(milliseconds: int, reached: bool) -> None:
    result = Result("", "")
    swaps = [swap.Swap(milliseconds / 1000, 0.02, 0.02)] * 3
    swap.report_overhead(swaps, [0.05] * 3, result)
    (goal,) = result.goals
    assert goal.reached is reached
    assert goal.measured == f"{milliseconds - 40}.0 ms"
    assert result.tables[0].note == f"A swap takes {milliseconds / 50:.2f} times as long as the engines' own calls."


def test_every_single_first_token_must_come_in_time() -> None:
    result = Result("", "")
    quick, slow = (swap.FirstToken(0.4, seconds, "m", "text") for seconds in (0.5, 1.4))
    swap.report_emulated([quick, quick, slow], [quick], True, result)
    assert [goal.reached for goal in result.goals] == [False, True]
    assert result.tables[0].rows[2][2:] == ["0.500 s (0.500 to 1.40)", "1.00 times"]


def test_another_completion_than_before_is_said() -> None:
    result = Result("", "")
    one = swap.FirstToken(0.4, 0.5, "m", "text")
    swap.report_emulated([one], [one], False, result)
    assert result.goals[1].reached is False
    assert "differ" in result.tables[0].note
