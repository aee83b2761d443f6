"""Explain over HTTP: why an instance is as it is, what it waits for, what comes next."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES

SLOW = {"BULLPEN_SIM_START_SECONDS": "2"}


def explain(daemon: Daemon, instance_id: str) -> dict[str, Any]:
    reply = daemon.http.get(f"{INSTANCES}/{instance_id}/explain")
    assert reply.status_code == 200, reply.text
    document = dict(reply.json())
    assert set(document) == {
        *("instance_id", "state", "summary", "activity", "waits_for", "next_step", "works", "notes")
    }
    assert (document["instance_id"], document["state"]) == (instance_id, daemon.instance(instance_id)["state"])
    assert document["summary"].endswith(".") or daemon.instance(instance_id).get("error")
    return document


def call(daemon: Daemon, instance_id: str, verb: str, **query: Any) -> None:
    reply = daemon.http.post(f"{INSTANCES}/{instance_id}/{verb}", params=query)
    assert reply.status_code == 200, reply.text


def test_nobody_of_that_id(shared: Daemon) -> None:
    reply = shared.http.get(f"{INSTANCES}/nobody/explain")
    assert reply.status_code == 404
    assert "'nobody'" in reply.json()["detail"]


def test_instance_that_was_never_decided_about(shared: Daemon) -> None:
    shared.create(instance_id="a")
    shared.wait_state("a", "ready")
    document = explain(shared, "a")
    assert (document["waits_for"], document["next_step"]) == (None, None)
    without = {"works": False, "why": "it was started without the engine's sleep", "at": None}
    assert document["works"] == {"level_1": without, "level_2": without}


def test_sleep_and_wake_are_told_with_their_reasons(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(mock_gpus=True, mock_gpu_count=1).wait_warm()
    daemon.create(instance_id="a", gpus=1)
    daemon.wait_state("a", "ready")
    call(daemon, "a", "sleep", level=1)
    asleep = explain(daemon, "a")
    assert "level 1" in asleep["summary"]
    call(daemon, "a", "wake")
    awake = explain(daemon, "a")
    assert awake["works"]["level_1"]["works"] is True and awake["works"]["level_1"]["why"]
    assert awake["works"]["level_2"] is None
    texts = [note["text"] for note in awake["notes"]]
    assert [any(word in text for text in texts) for word in ("goes to sleep", "wakes")] == [True, True]
    times = [datetime.fromisoformat(note["at"]) for note in awake["notes"]]
    assert times == sorted(times), "oldest first"
    assert daemon.instance("a")["reason"] == texts[-1], "the document has the newest"


def test_level_that_does_not_work_is_remembered(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(mock_gpus=True, mock_gpu_count=1).wait_warm()
    daemon.create(instance_id="a", gpus=1, env_vars={"BULLPEN_SIM_FAIL": "wake"})
    daemon.wait_state("a", "ready")
    call(daemon, "a", "sleep", level=1)
    call(daemon, "a", "wake")
    works = explain(daemon, "a")["works"]["level_1"]
    assert works["works"] is False and works["why"]


def test_wait_for_another(shared: Daemon) -> None:
    for name in ("a", "b"):
        shared.create(instance_id=name, gpu_uuids=["GPU-0"], gpu_share=0.5, env_vars=SLOW)
    document = explain(shared, "b")
    assert "'a'" in document["waits_for"] and "GPU-0" in document["waits_for"]
    assert "'a'" in document["summary"]


def test_refusal_is_told(shared: Daemon) -> None:
    shared.create(instance_id="a")
    shared.wait_state("a", "ready")
    assert shared.http.post(f"{INSTANCES}/a/sleep").status_code == 409
    assert any("refused" in note["text"] for note in explain(shared, "a")["notes"])


def test_next_step_down(shared: Daemon) -> None:
    shared.create(instance_id="a", gpus=1, sleep_after="1h", stop_after="2h")
    shared.wait_state("a", "ready")
    step = explain(shared, "a")["next_step"]
    assert step["to"] == "level_1"
    assert 0 < step["in_seconds"] <= 3600
    assert "3600" in step["why"]
    call(shared, "a", "sleep")
    assert explain(shared, "a")["next_step"]["to"] == "stopped"


def test_instance_that_failed_says_why(shared: Daemon) -> None:
    shared.create(instance_id="bad", env_vars={"BULLPEN_SIM_FAIL": "start"})
    error = shared.wait_state("bad", "failed")["error"]
    assert error["message"] in explain(shared, "bad")["summary"]
