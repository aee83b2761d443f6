"""Sleep and wake over HTTP: what they answer, what becomes of requests meanwhile, and what they refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.web.calls import INSTANCES, lives, problems, watching

PROMPT = {"model": "m", "prompt": "hello", "max_tokens": 4}
BROKEN = "--model broken"
"""For sleeps that fail: that is remembered of the model, and would count in other tests."""


def post(daemon: Daemon, instance_id: str, verb: str, **query: Any) -> httpx.Response:
    return daemon.http.post(f"{INSTANCES}/{instance_id}/{verb}", params=query)


def done(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def refusal(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["detail"])


@pytest.fixture
def sleeper(shared: Daemon) -> dict[str, Any]:
    """An instance that may sleep, ready."""
    shared.create(instance_id="a", gpus=1)
    return shared.wait_state("a", "ready")


class Prompt:
    """A request to an instance, made by a thread."""

    def __init__(self, url: str, **fields: Any) -> None:
        self.replies: list[httpx.Response] = []
        body = {**PROMPT, **fields}
        self._thread = threading.Thread(
            target=lambda: self.replies.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30)), daemon=True
        )
        self._thread.start()

    def reply(self) -> httpx.Response:
        self._thread.join(30)
        return self.replies[0]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(shared: Daemon, sleeper: dict[str, Any], level: int) -> None:
    asleep = done(post(shared, "a", "sleep", level=level))
    assert (asleep["state"], asleep["status"], asleep["sleep_level"]) == ("sleeping", "running", level)
    assert asleep["reason"]
    assert asleep["pid"] == sleeper["pid"]
    seen = shared.instance("a")
    assert (seen["state"], seen["sleep_level"]) == ("sleeping", level)
    assert "activity" not in seen
    awake = done(post(shared, "a", "wake"))
    assert awake["state"] == "ready"
    assert "sleep_level" not in awake
    assert awake["pid"] == sleeper["pid"], "the process lived on"
    assert httpx.post(f"{awake['url']}/v1/completions", json=PROMPT).status_code == 200


def test_level_left_out_is_the_lightest(shared: Daemon, sleeper: dict[str, Any]) -> None:
    assert done(post(shared, "a", "sleep"))["sleep_level"] == 1


def test_once_is_enough(shared: Daemon, sleeper: dict[str, Any]) -> None:
    assert done(post(shared, "a", "wake"))["pid"] == sleeper["pid"]
    done(post(shared, "a", "sleep", level=1))
    notes = len(shared.http.get(f"{INSTANCES}/a/explain").json()["notes"])
    assert done(post(shared, "a", "sleep", level=1))["sleep_level"] == 1
    assert len(shared.http.get(f"{INSTANCES}/a/explain").json()["notes"]) == notes, "nothing was done"


def test_deeper_but_not_lighter(shared: Daemon, sleeper: dict[str, Any]) -> None:
    levels = [done(post(shared, "a", "sleep", level=level))["sleep_level"] for level in (1, 2, 1)]
    assert levels == [1, 2, 2]


def test_many_callers_at_once(shared: Daemon, sleeper: dict[str, Any]) -> None:
    for verb, state in (("sleep", "sleeping"), ("wake", "ready")):
        with ThreadPoolExecutor(5) as callers:
            replies = list(callers.map(httpx.post, [f"{shared.url}{INSTANCES}/a/{verb}"] * 5))
        assert [done(reply)["state"] for reply in replies] == [state] * 5


def test_requests_are_held_while_it_sleeps(shared: Daemon, sleeper: dict[str, Any]) -> None:
    done(post(shared, "a", "sleep"))
    prompt = Prompt(sleeper["url"])
    with pytest.raises(httpx.TimeoutException):  # another one is not answered either
        httpx.post(f"{sleeper['url']}/v1/completions", json=PROMPT, timeout=0.3)
    assert not prompt.replies
    done(post(shared, "a", "wake"))
    assert prompt.reply().status_code == 200


def test_requests_are_refused_where_the_caller_chose_so(shared: Daemon, sleeper: dict[str, Any]) -> None:
    done(post(shared, "a", "sleep", new_requests="refuse"))
    assert httpx.post(f"{sleeper['url']}/v1/completions", json=PROMPT).status_code == 503
    done(post(shared, "a", "wake"))
    assert httpx.post(f"{sleeper['url']}/v1/completions", json=PROMPT).status_code == 200


def test_requests_in_flight_end_first(shared: Daemon) -> None:
    shared.create(instance_id="a", gpus=1, env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": 20})
    url = shared.wait_state("a", "ready")["url"]
    prompt = Prompt(url, max_tokens=8)
    wait_until(lambda: busy(httpx.get(f"{url}/metrics").text))
    done(post(shared, "a", "sleep"))
    assert prompt.replies, "answered before it slept"
    assert prompt.reply().json()["usage"]["completion_tokens"] == 8


def busy(metrics: str) -> bool:
    """Whether a server's own figures show a request that runs."""
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    return any(float(line.split()[-1]) > 0 for line in lines)


def test_drain_has_an_end(shared: Daemon) -> None:
    shared.create(instance_id="a", gpus=1, env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": 5})
    url = shared.wait_state("a", "ready")["url"]
    prompt = Prompt(url, max_tokens=400)
    wait_until(lambda: busy(httpx.get(f"{url}/metrics").text))
    assert done(post(shared, "a", "sleep", drain=0.1))["state"] == "sleeping"
    notes = [note["text"] for note in shared.http.get(f"{INSTANCES}/a/explain").json()["notes"]]
    assert any("1 requests were cut off" in note for note in notes), notes
    done(post(shared, "a", "wake"))
    prompt.reply()


def test_list_counts_a_sleeper_as_running(shared: Daemon, sleeper: dict[str, Any]) -> None:
    done(post(shared, "a", "sleep"))
    listed = shared.http.get(INSTANCES).json()
    assert listed["running_instances"] == 1
    assert listed["instances"][0]["sleep_level"] == 1


def test_emulated_sleep_is_told_as_what_it_is(shared: Daemon) -> None:
    shared.create(instance_id="a", sleep="emulate")
    ready = shared.wait_state("a", "ready")
    assert ready["can_sleep"] is True
    process = psutil.Process(ready["pid"])
    asleep = done(post(shared, "a", "sleep"))
    assert (asleep["state"], asleep["sleep_emulated"], asleep["status"]) == ("sleeping", True, "stopped")
    assert "sleep_level" not in asleep
    assert not lives(process)
    awake = done(post(shared, "a", "wake"))
    assert (awake["state"], awake["url"]) == ("ready", ready["url"])
    assert awake["pid"] != ready["pid"]


def test_wake_starts_one_that_has_ended(shared: Daemon) -> None:
    shared.create(instance_id="a")
    process = psutil.Process(shared.wait_state("a", "ready")["pid"])
    process.kill()
    shared.wait_state("a", "failed")
    wait_until(lambda: post(shared, "a", "wake").status_code == 200)  # refused until the last process is gone
    awake = shared.instance("a")
    assert awake["state"] == "ready"
    assert awake["pid"] != process.pid
    assert not {"error", "exit_code", "ended_at"} & set(awake)


@pytest.mark.parametrize("verb", ["sleep", "wake"])
def test_nobody_of_that_id(shared: Daemon, verb: str) -> None:
    assert "'nobody'" in refusal(post(shared, "nobody", verb), 404)


@pytest.mark.parametrize("fields", [{}, {"gpus": 1, "sleep": "off"}])
def test_instance_that_cannot_sleep_says_how_it_could(shared: Daemon, fields: dict[str, Any]) -> None:
    shared.create(instance_id="a", **fields)
    assert shared.wait_state("a", "ready")["can_sleep"] is False
    sentence = refusal(post(shared, "a", "sleep"), 409)
    assert "'a'" in sentence and "sleep: engine" in sentence and "sleep: emulate" in sentence
    assert shared.instance("a")["state"] == "ready"


def test_instance_that_is_starting_cannot_sleep(shared: Daemon) -> None:
    shared.create(instance_id="a", gpus=1, env_vars={"BULLPEN_SIM_START_SECONDS": "5"})
    assert "when it is ready" in refusal(post(shared, "a", "sleep"), 409)


def test_wake_onto_a_gpu_of_another(shared: Daemon) -> None:
    shared.create(instance_id="a", gpu_uuids=["GPU-0"])
    shared.wait_state("a", "ready")
    done(post(shared, "a", "sleep"))
    shared.create(instance_id="b", gpu_uuids=["GPU-0"])
    shared.wait_state("b", "ready")
    sentence = refusal(post(shared, "a", "wake"), 409)
    assert "GPU-0" in sentence and "'b'" in sentence
    shared.delete("b")
    assert done(post(shared, "a", "wake"))["state"] == "ready"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"level": 0}, "level"),
        ({"level": 3}, "level"),
        ({"level": "deep"}, "level"),
        ({"level": ""}, "level"),
        ({"level": "9" * 5000}, "level"),
        ({"drain": -1}, "drain"),
        ({"drain": "nan"}, "drain"),
        ({"drain": "inf"}, "drain"),
        ({"drain": "1e300"}, "drain"),
        ({"drain": "soon"}, "drain"),
        ({"new_requests": "drop"}, "new_requests"),
        ({"levle": 2}, "levle"),
    ],
)
def test_query_that_makes_no_sense(shared: Daemon, sleeper: dict[str, Any], query: dict[str, Any], field: str) -> None:
    assert problems(post(shared, "a", "sleep", **query))[0]["loc"] == ["query", field]
    assert shared.instance("a")["state"] == "ready"


def test_sleep_that_fails_leaves_it_awake(shared: Daemon) -> None:
    shared.create(BROKEN, instance_id="a", gpus=1, env_vars={"BULLPEN_SIM_FAIL": "sleep"})
    pid = shared.wait_state("a", "ready")["pid"]
    assert refusal(post(shared, "a", "sleep"), 500)
    after = shared.instance("a")
    assert (after["state"], after["pid"]) == ("ready", pid)
    assert httpx.post(f"{after['url']}/v1/completions", json={**PROMPT, "model": "broken"}).status_code == 200


def test_wake_that_fails_is_a_restart(shared: Daemon) -> None:
    shared.create(BROKEN, instance_id="a", gpus=1, env_vars={"BULLPEN_SIM_FAIL": "wake"})
    pid = shared.wait_state("a", "ready")["pid"]
    done(post(shared, "a", "sleep"))
    awake = done(post(shared, "a", "wake"))
    assert awake["state"] == "ready"
    assert awake["pid"] != pid


def test_steps_are_seen_by_watchers_of_fine_events(shared: Daemon, sleeper: dict[str, Any]) -> None:
    with watching(shared, events="all") as watch:
        assert watch.next()["type"] == "CREATED"
        done(post(shared, "a", "sleep"))
        line = watch.next()
        while line["object"].get("state") != "sleeping":
            assert line["type"] == "STATE"
            assert line["object"]["activity"]["doing"] == "sleep"
            line = watch.next()
        assert line["object"]["sleep_level"] == 1


def test_instance_that_steps_down_by_itself(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(mock_gpus=True, mock_gpu_count=1).wait_warm()
    daemon.create(instance_id="a", gpus=1, sleep_after=0.1, stop_after="1s")
    daemon.wait_state("a", "sleeping", "stopped")
    notes = [note["text"] for note in daemon.http.get(f"{INSTANCES}/a/explain").json()["notes"]]
    assert any("no request for 0.1 s" in note for note in notes), notes
    assert daemon.wait_state("a", "stopped")["status"] == "stopped"
    assert done(post(daemon, "a", "wake"))["state"] == "ready"
