"""The whole course of ``grpc``, with the simulator where it takes real vLLM, and its tables."""

from __future__ import annotations

import pytest

from bench import inference
from bench.common import BenchError, Options, Result
from bench.load import Client
from bench.lock_step import Round
from tests.bench.conftest import Silent


def test_all_ways_are_measured_in_turn(options: Options, progress: Silent) -> None:
    result = Result("", "")
    inference.measure_throughput(options, progress, 2, 0.2, (4,), result)
    measured = result.data["throughput"]
    assert [one["tokens"] for one in measured] == [4, 4]
    for one in measured:
        assert set(one["parts"]) == set(Client)
        assert all(part["rate"] > 0 for part in one["parts"].values())
        assert one["parts"]["grpc.aio"]["daemon"] > one["parts"]["aiohttp"]["daemon"] >= 0


def test_calls_at_the_same_time_are_measured_beside_lock_step(options: Options, progress: Silent) -> None:
    result = Result("", "")
    inference.measure_lock_step(options, progress, 1, 2, inference.Served.sim(), result)
    (measured,) = result.data["lock_step"]
    assert measured["together"] > measured["lock_step"] > 0
    assert measured["same"]


def part(rate: float) -> inference.Part:
    return inference.Part(rate, 20e-6, 300e-6, 150e-6)


def turns(tokens: int, *shares: float) -> list[inference.Turn]:
    """Rounds in which so much is left through gRPC, whoever calls."""
    return [
        inference.Turn(tokens, {client: part(1000 * share if client.through else 1000) for client in Client})
        for share in shares
    ]


@pytest.mark.parametrize(("shares", "reached"), [((0.7, 0.81, 0.9), True), ((0.7, 0.79, 0.9), False)])
def test_the_median_of_the_worst_length_counts_for_each_pair(shares: tuple[float, ...], reached: bool) -> None:
    result = Result("", "")
    inference.report_throughput([*turns(32, 0.95, 0.96), *turns(16, *shares)], result)
    assert len(result.goals) == len(inference.PAIRS)
    throughput, cost = result.tables
    for number, goal in enumerate(result.goals):
        assert goal.reached is reached
        assert goal.measured == (f"{shares[1]:.2f}" if reached else f"{shares[1]:.2f}; reached at 32 tokens")
        assert "16 tokens" in goal.what
        short, long = throughput.rows[2 * number : 2 * number + 2]
        assert short[-2:] == [f"{shares[1]:.2f} (0.70 to 0.90)", "yes" if reached else "**no**"]
        assert (short[1], long[1], long[-1]) == ("16", "32", "yes")
    assert cost.rows[0][:4] == ["16: minimal gRPC", "20 µs", "300 µs", "150 µs"]


@pytest.mark.parametrize(
    ("callers", "said"), [(451e-6, "together: httpx (at 16, 32 tokens)."), (449e-6, "together: none.")]
)
def test_clients_that_cost_more_than_the_servers_are_named(callers: float, said: str) -> None:
    result = Result("", "")
    dear = inference.Part(1000, callers, 300e-6, 150e-6)
    measured = [*turns(16, 0.9), *turns(32, 0.9)]
    inference.report_throughput(
        [inference.Turn(turn.tokens, {**turn.parts, Client.HTTPX: dear}) for turn in measured], result
    )
    assert result.tables[1].note.endswith(said)


@pytest.mark.parametrize(("together", "reached"), [(51.0, True), (49.0, False)])
def test_the_gain_over_lock_step_is_that_of_each_round(together: float, reached: bool) -> None:
    result = Result("", "")
    inference.report_lock_step(
        [Round(together, 10.0, True), Round(2 * together, 10.0, True), Round(1, 10, True)], result
    )
    assert result.goals[0].reached is reached
    assert result.tables[0].rows[1][-1] == f"{together / 10:.2f} (0.10 to {together / 5:.2f})"


def test_other_completions_in_lock_step_are_said() -> None:
    result = Result("", "")
    inference.report_lock_step([Round(60.0, 10.0, True), Round(60.0, 10.0, False)], result)
    assert "differ" in result.tables[0].note


def test_a_completion_of_another_length_is_no_measurement() -> None:
    inference.check(16, 16)
    with pytest.raises(BenchError, match="asked for 16 tokens, the engine wrote 15"):
        inference.check(16, 15)


def test_a_part_that_fails_says_why() -> None:
    with pytest.raises(BenchError, match=r"bench\.callers failed:(.|\n)*KeyError"):
        inference.ask("bench.callers", {}, 1.0)
