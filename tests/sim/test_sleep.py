"""Sleeping and waking: requests wait meanwhile, state is reported, failures are as asked."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.sim.simulator import DEADLINE_SECONDS, Simulator, wait_for

LONG = 2000  # tokens; at the rates used here, long enough to be caught in the middle


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def running(simulator: Simulator) -> float:
    return simulator.metric("vllm:num_requests_running")


def waiting(simulator: Simulator) -> float:
    return simulator.metric("vllm:num_requests_waiting")


def states(simulator: Simulator) -> list[float]:
    names = ("awake", "weights_offloaded", "discard_all")
    return [simulator.metric("vllm:engine_sleep_state", sleep_state=name) for name in names]


@pytest.mark.parametrize(("level", "expected"), [(0, [0, 0, 0]), (1, [0, 1, 0]), (2, [0, 0, 1])])
def test_sleep_and_wake(shared: Simulator, level: int, expected: list[float]) -> None:
    before = shared.metric("vllm:sleep_mode_operation_duration_seconds_count", operation="sleep") if level else 0
    answer = shared.http.post("/sleep", params={"level": level})
    assert (answer.status_code, answer.json()) == (200, {"status": "sleeping", "level": level})
    assert shared.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert shared.http.get("/health").status_code == 200
    assert states(shared) == expected
    assert shared.http.post("/wake_up").json() == {"status": "awake", "tags": None}
    assert shared.http.get("/is_sleeping").json() == {"is_sleeping": False}
    assert states(shared) == [1, 0, 0]
    assert shared.metric("vllm:sleep_mode_operation_duration_seconds_count", operation="sleep") > before
    assert shared.metric("vllm:sleep_mode_operations_in_flight", operation="wake") == 0


def test_waking_in_parts(shared: Simulator) -> None:
    shared.http.post("/sleep")
    for tags, status in [(["weights"], "sleeping"), (["nonsense"], "sleeping"), (["kv_cache"], "awake")]:
        assert shared.http.post("/wake_up", params={"tags": tags}).json() == {"status": status, "tags": tags}
        assert shared.http.get("/is_sleeping").json() == {"is_sleeping": status == "sleeping"}
    shared.http.post("/sleep", params={"level": 0})
    assert shared.http.post("/wake_up", params={"tags": ["scheduling"]}).json()["status"] == "awake"


@pytest.mark.parametrize("query", ["level=3", "level=x", "level=", "mode=nap"])
def test_what_cannot_be_meant(shared: Simulator, query: str) -> None:
    answer = shared.http.post(f"/sleep?{query}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "Bad Request")
    assert shared.http.get("/is_sleeping").json() == {"is_sleeping": False}


def test_requests_wait_until_the_engine_wakes(shared: Simulator, threads: ThreadPoolExecutor) -> None:
    expected = shared.complete("x")["choices"]
    shared.http.post("/sleep")
    answer = threads.submit(shared.ask)
    stream = threads.submit(shared.ask, stream=True)
    wait_for("both wait", lambda: waiting(shared) == 2)
    assert running(shared) == 0
    shared.http.post("/wake_up")
    assert answer.result(DEADLINE_SECONDS).json()["choices"] == expected
    assert stream.result(DEADLINE_SECONDS).text.endswith("data: [DONE]\n\n")


def test_sleep_modes(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with Simulator.serving(tmp_path, tokens_per_second=2000, sleep_seconds=0, wake_seconds=0) as simulator:
        aborted = threads.submit(simulator.ask, max_tokens=100_000)
        wait_for("it runs", lambda: running(simulator) == 1)
        simulator.http.post("/sleep?mode=abort")
        choice = aborted.result(DEADLINE_SECONDS).json()["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert len(choice["text"].split()) < 100_000
        assert simulator.metric("vllm:request_success_total", finished_reason="abort") == 1
        simulator.http.post("/wake_up")

        finished = threads.submit(simulator.ask, max_tokens=LONG)
        wait_for("it runs", lambda: running(simulator) == 1)
        simulator.http.post("/sleep?mode=wait")
        assert running(simulator) == 0
        assert len(finished.result(DEADLINE_SECONDS).json()["choices"][0]["text"].split()) == LONG
        simulator.http.post("/wake_up")

        kept = threads.submit(simulator.ask, max_tokens=LONG)
        wait_for("it runs", lambda: running(simulator) == 1)
        simulator.http.post("/sleep?mode=keep")
        assert running(simulator) == 1
        assert not kept.done()
        simulator.http.post("/wake_up")
        assert len(kept.result(DEADLINE_SECONDS).json()["choices"][0]["text"].split()) == LONG


def test_operations_take_their_time_and_do_not_block_the_rest(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with Simulator.serving(tmp_path, sleep_seconds=0.3, wake_seconds=0.2) as simulator:
        asleep = threads.submit(httpx.post, f"{simulator.url}/sleep", timeout=DEADLINE_SECONDS, trust_env=False)
        sample = 'vllm:sleep_mode_operations_in_flight{operation="sleep"} 1.0'
        wait_for("it is under way", lambda: sample in simulator.http.get("/metrics").text)
        assert simulator.http.get("/health").status_code == 200
        assert not asleep.done()
        assert asleep.result(DEADLINE_SECONDS).elapsed.total_seconds() >= 0.3
        assert simulator.http.post("/wake_up").elapsed.total_seconds() >= 0.2
        # A client that does not wait for the end of the operation does not undo it.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{simulator.url}/sleep", timeout=0.1, trust_env=False)
        simulator.http.post("/sleep")
        assert states(simulator) == [0, 1, 0]


def test_failures_as_asked(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, fail="sleep") as simulator:
        answer = simulator.http.post("/sleep")
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        # As vLLM: requests are paused before memory is touched.
        assert simulator.http.get("/is_sleeping").json() == {"is_sleeping": True}
        assert states(simulator) == [1, 0, 0]
        assert simulator.http.post("/wake_up").json()["status"] == "awake"
        assert simulator.complete()["choices"]
    with Simulator.serving(tmp_path, fail="wake") as simulator:
        simulator.http.post("/sleep")
        assert simulator.http.post("/wake_up").status_code == 500
        assert simulator.http.get("/is_sleeping").json() == {"is_sleeping": True}
        assert "BULLPEN_SIM_FAIL=wake" in simulator.log
