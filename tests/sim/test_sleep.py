"""Sleeping and waking: requests wait meanwhile, state is reported, weights may be lost, failures are as asked."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.sim.simulator import DEADLINE_SECONDS, Simulator, is_alive, wait_for

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
    assert reload(shared).status_code == 200


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


def text(simulator: Simulator) -> object:
    return simulator.complete("the same question", max_tokens=1)["choices"][0]["text"]  # type: ignore[index]


def everything(simulator: Simulator) -> list[object]:
    """What the simulator answers on every path, whole and streamed."""
    messages = [{"role": "user", "content": "x"}]
    chat = simulator.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2}).json()
    vector = simulator.http.post("/v1/embeddings", json={"input": "x"}).json()
    lines = simulator.ask("x", stream=True, max_tokens=2).text.splitlines()
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    return [text(simulator), pieces, chat["choices"][0]["message"]["content"], vector["data"][0]["embedding"]]


def reload(simulator: Simulator) -> httpx.Response:
    return simulator.http.post("/collective_rpc", json={"method": "reload_weights"})


@pytest.mark.parametrize("in_parts", [False, True])
def test_level_2_loses_the_weights_until_they_are_loaded_again(shared: Simulator, in_parts: bool) -> None:
    right = everything(shared)
    shared.http.post("/sleep?level=2")
    if in_parts:
        shared.http.post("/wake_up?tags=weights")
        assert reload(shared).json() == {"results": [None]}
        assert shared.http.get("/is_sleeping").json() == {"is_sleeping": True}
        assert shared.http.post("/wake_up?tags=kv_cache").json()["status"] == "awake"
        assert everything(shared) == right
        shared.http.post("/sleep?level=2")
    shared.http.post("/wake_up")
    wrong = everything(shared)
    assert not any(one == other for one, other in zip(right, wrong, strict=True))
    assert everything(shared) == wrong
    # Level 1 keeps what there is.
    shared.http.post("/sleep?level=1")
    shared.http.post("/wake_up")
    assert everything(shared) == wrong
    assert reload(shared).status_code == 200
    assert everything(shared) == right


def test_level_1_keeps_the_weights_and_another_level_changes_nothing_meanwhile(shared: Simulator) -> None:
    right = text(shared)
    shared.http.post("/sleep?level=1")
    shared.http.post("/sleep?level=2")
    shared.http.post("/wake_up")
    assert text(shared) == right


def test_weights_cannot_be_loaded_while_they_are_asleep(shared: Simulator) -> None:
    shared.http.post("/sleep?level=2")
    answer = reload(shared)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    shared.http.post("/wake_up")
    assert reload(shared).status_code == 200


def test_what_waits_for_the_wake_is_answered_with_the_weights_of_then(
    shared: Simulator, threads: ThreadPoolExecutor
) -> None:
    right = text(shared)
    shared.http.post("/sleep?level=2")
    answer = threads.submit(shared.ask, "the same question", stream=True, max_tokens=1)
    wait_for("it waits", lambda: waiting(shared) == 1)
    shared.http.post("/wake_up")
    assert f'"text":"{right}"' not in answer.result(DEADLINE_SECONDS).text
    assert reload(shared).status_code == 200


def test_without_sleep_mode_a_sleep_is_answered_and_discards_nothing(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, sleep_seconds=0, wake_seconds=0) as simulator:
        right = text(simulator)
        assert simulator.http.post("/sleep?level=2").json() == {"status": "sleeping", "level": 2}
        assert simulator.http.get("/is_sleeping").json() == {"is_sleeping": True}
        assert simulator.http.post("/wake_up").json()["status"] == "awake"
        assert text(simulator) == right


@pytest.mark.parametrize(
    ("body", "status"),
    [("{bad", 400), ("[]", 400), ("{}", 400), ('{"method": null}', 400), ('{"method": "no_such_method"}', 500)],
)
def test_calls_of_workers_that_are_refused(shared: Simulator, body: str, status: int) -> None:
    answer = shared.http.post("/collective_rpc", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


def test_caches_can_be_reset(shared: Simulator) -> None:
    assert shared.http.post("/reset_prefix_cache").json() == {"success": True}
    assert [shared.http.post(f"/reset_{name}_cache").status_code for name in ("mm", "encoder")] == [200, 200]
    assert shared.http.get("/reset_mm_cache").status_code == 405


def test_failures_that_change_while_the_server_runs(tmp_path: Path) -> None:
    file = tmp_path / "failures"
    with Simulator.serving(tmp_path, "--enable-sleep-mode", fail_file=file, wake_seconds=0) as simulator:
        right = text(simulator)
        file.write_text("wake,request")
        assert simulator.http.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        simulator.http.post("/sleep")
        assert simulator.http.post("/wake_up").status_code == 500
        file.write_text("answer")
        assert simulator.http.post("/wake_up").json()["status"] == "awake"
        assert text(simulator) != right
        file.unlink()
        assert text(simulator) == right


def test_wrong_answers_after_the_first_wake(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, "--enable-sleep-mode", fail="answer", wake_seconds=0) as simulator:
        before = everything(simulator)
        assert everything(simulator) == before
        simulator.http.post("/sleep")
        simulator.http.post("/wake_up")
        after = everything(simulator)
        assert not any(one == other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("operation", ["sleep", "wake"])
def test_an_operation_that_hangs(tmp_path: Path, operation: str) -> None:
    with Simulator.serving(tmp_path, "--enable-sleep-mode", fail=f"{operation}_hang") as simulator:
        if operation == "wake":
            assert simulator.http.post("/sleep").status_code == 200
        for method, path in (("POST", "/sleep" if operation == "sleep" else "/wake_up"), ("GET", "/is_sleeping")):
            with pytest.raises(httpx.ReadTimeout):
                httpx.request(method, f"{simulator.url}{path}", timeout=0.2, trust_env=False)
        assert simulator.http.get("/health").status_code == 200
        engine = simulator.engine_pid
        simulator.process.terminate()
        assert simulator.wait_ended() == 0
        wait_for("the engine child has ended", lambda: not is_alive(engine))


@pytest.mark.parametrize("operation", ["sleep", "wake"])
def test_an_operation_in_which_the_engine_child_dies(tmp_path: Path, operation: str) -> None:
    with Simulator.serving(tmp_path, "--enable-sleep-mode", fail=f"{operation}_exit") as simulator:
        if operation == "wake":
            assert simulator.http.post("/sleep").status_code == 200
        assert simulator.http.post("/sleep" if operation == "sleep" else "/wake_up").status_code == 500
        assert simulator.http.get("/health").status_code == 503
        assert simulator.wait_ended() == 0
        assert "EngineCore died unexpectedly (exit code 1)" in simulator.log
