"""Instances: what a create, a look, a list and a delete answer, and the words for how an instance is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import datetime

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES, lives, problems, tree, wait_for_child


def test_created_under_a_chosen_id(shared: Daemon) -> None:
    created = shared.create(instance_id="chosen")
    assert created["status"] == "started"
    assert created["instance_id"] == "chosen"
    assert created["state"] == "starting"
    assert created["phase"]
    assert 0 <= created["progress"] <= 1
    assert created["engine"] == "sim"
    assert lives(psutil.Process(created["pid"]))


def test_id_that_exists(shared: Daemon) -> None:
    shared.create(instance_id="one", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.2"})
    for state in ("starting", "failed"):
        shared.wait_state("one", state)
        reply = shared.http.put(f"{INSTANCES}/one", json={"options": "--model other"})
        assert reply.status_code == 409
        assert "'one'" in reply.json()["detail"]
    assert shared.instance("one")["model"] == "m"


def test_ready_instance(shared: Daemon) -> None:
    shared.create(instance_id="one")
    document = shared.wait_state("one", "ready")
    assert document["status"] == "running"
    assert not {"phase", "progress", "exit_code", "error"} & set(document)
    assert datetime.fromisoformat(document["ready_at"]) >= datetime.fromisoformat(document["created_at"])
    assert list(document["phases"].values()) == sorted(document["phases"].values())
    assert {"start", "configuration", "weights", "kv_cache", "bind", "ready"} <= set(document["phases"])
    assert httpx.get(f"{document['url']}/health").status_code == 200


def test_phases_are_seen_while_it_starts(shared: Daemon) -> None:
    shared.create(instance_id="slow", env_vars={"BULLPEN_SIM_START_SECONDS": "1"})
    seen: list[tuple[str, float]] = []

    def look() -> bool:
        document = shared.instance("slow")
        if document["state"] == "starting" and (document["phase"], document["progress"]) not in seen:
            seen.append((document["phase"], document["progress"]))
        return bool(document["state"] == "ready")

    wait_until(look)
    assert "weights" in dict(seen)
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)
    assert len({progress for _, progress in seen}) > 1


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "stopped"), (1, "failed"), (3, "failed"), (-signal.SIGKILL, "failed"), (-signal.SIGSEGV, "failed")],
)
def test_ended_by_itself(shared: Daemon, code: int, state: str) -> None:
    if code >= 0:
        shared.create(instance_id="one", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.1", "BULLPEN_SIM_EXIT_CODE": str(code)})
    else:
        shared.create(instance_id="one")
        os.kill(shared.wait_state("one", "ready")["pid"], -code)
    document = shared.wait_state("one", "stopped", "failed")
    assert document["state"] == state
    assert document["status"] == "stopped"
    assert document["exit_code"] == code
    assert ("error" in document) == (state == "failed")
    listed = shared.http.get(INSTANCES).json()
    assert (listed["total_instances"], listed["running_instances"]) == (1, 0)
    assert shared.delete("one")["status"] == "not_running"


def test_start_that_fails_says_why_and_keeps_its_log(shared: Daemon) -> None:
    shared.create(instance_id="bad", env_vars={"BULLPEN_SIM_FAIL": "start"})
    document = shared.wait_state("bad", "failed")
    assert document["exit_code"] not in (0, None)
    assert set(document["error"]) == {"class", "message"}
    assert document["error"]["message"]
    assert "Traceback" in shared.log("bad")
    assert shared.delete("bad")["status"] == "not_running"
    assert shared.http.get(f"{INSTANCES}/bad/log").status_code == 404


def test_list(shared: Daemon) -> None:
    empty = shared.http.get(INSTANCES).json()
    assert set(empty) == {"revision", "total_instances", "running_instances", "instances"}
    assert (empty["total_instances"], empty["running_instances"], empty["instances"]) == (0, 0, [])
    for name in ("a", "b", "c"):
        shared.create(instance_id=name)
    shared.create(instance_id="dead", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.05"})
    shared.wait_state("dead", "failed")
    listed = shared.http.get(INSTANCES).json()
    assert (listed["total_instances"], listed["running_instances"]) == (4, 3)
    assert [one["instance_id"] for one in listed["instances"]] == ["a", "b", "c", "dead"]
    assert [one["status"] for one in listed["instances"]] == ["running"] * 3 + ["stopped"]
    assert listed["revision"] == max(one["revision"] for one in listed["instances"])


@pytest.mark.parametrize("no", ["False", "false", "0", "no", "off"])
def test_list_of_ids(shared: Daemon, no: str) -> None:
    shared.create(instance_id="a")
    shared.create(instance_id="b")
    listed = shared.http.get(INSTANCES, params={"detail": no}).json()
    assert set(listed) == {"revision", "instance_ids", "count"}
    assert (listed["instance_ids"], listed["count"]) == (["a", "b"], 2)


@pytest.mark.parametrize("yes", ["True", "true", "1"])
def test_list_with_details(shared: Daemon, yes: str) -> None:
    assert "instances" in shared.http.get(INSTANCES, params={"detail": yes}).json()


@pytest.mark.parametrize("neither", ["maybe", "", "2", "None", "s3cr3t"])
def test_list_where_detail_is_no_boolean(shared: Daemon, neither: str) -> None:
    reply = shared.http.get(INSTANCES, params={"detail": neither})
    assert problems(reply)[0]["loc"] == ["query", "detail"]
    assert "s3cr3t" not in reply.text


@pytest.mark.parametrize("stubborn", ["0", "1", "2"])
def test_delete_leaves_no_process(shared: Daemon, stubborn: str) -> None:
    created = shared.create(instance_id="one", env_vars={"BULLPEN_SIM_STUBBORN": stubborn})
    shared.wait_state("one", "ready")
    processes = tree(created["pid"])
    assert len(processes) > 1
    deleted = shared.delete("one")
    assert not [process for process in processes if lives(process)]
    assert deleted["status"] == "terminated"
    assert deleted["instance_id"] == "one"
    assert deleted["state"] == "stopped"
    for path in ("one", "one/log"):
        assert shared.http.get(f"{INSTANCES}/{path}").status_code == 404
    assert shared.http.delete(f"{INSTANCES}/one").status_code == 404


def test_delete_after_a_crash_of_the_server_alone(shared: Daemon) -> None:
    created = shared.create(instance_id="one", env_vars={"BULLPEN_SIM_STUBBORN": "1"})
    shared.wait_state("one", "ready")
    child = wait_for_child(created["pid"])
    os.kill(created["pid"], signal.SIGKILL)
    assert shared.delete("one")["status"] in ("not_running", "terminated")
    assert not lives(child)


def test_delete_while_it_starts(shared: Daemon) -> None:
    created = shared.create(instance_id="slow", env_vars={"BULLPEN_SIM_START_SECONDS": "5"})
    wait_for_child(created["pid"])
    processes = tree(created["pid"])
    assert shared.delete("slow")["status"] == "terminated"
    assert not [process for process in processes if lives(process)]
    assert shared.create(instance_id="slow")["status"] == "started"


def test_delete_right_after_create(shared: Daemon) -> None:
    for _ in range(10):
        created = shared.create(instance_id="one")
        assert shared.delete("one")["status"] == "terminated"
        assert not is_alive(created["pid"])


def test_delete_all(shared: Daemon) -> None:
    assert shared.http.delete(INSTANCES).json() == {
        "status": "all_stopped",
        "stopped_instances": [],
        "total_stopped": 0,
    }
    pids = {name: shared.create(instance_id=name)["pid"] for name in ("a", "b", "c")}
    shared.create(instance_id="dead", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.05"})
    shared.wait_state("dead", "failed")
    reply = shared.http.delete(INSTANCES).json()
    assert (reply["status"], reply["total_stopped"]) == ("all_stopped", 4)
    words = {one["instance_id"]: one["status"] for one in reply["stopped_instances"]}
    assert words == {"a": "terminated", "b": "terminated", "c": "terminated", "dead": "not_running"}
    assert not [pid for pid in pids.values() if is_alive(pid)]
    assert shared.http.get(INSTANCES).json()["total_instances"] == 0


def test_engine_that_cannot_be_used(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(engine_python="/bin/false")
    reply = daemon.http.post(INSTANCES, json={"options": "--model m"})
    assert reply.status_code == 500
    assert "sim" in reply.json()["detail"]
    assert daemon.http.get("/ready").status_code == 503
    assert daemon.http.get("/health").json() == {"status": "OK"}
    assert daemon.http.get(INSTANCES).json()["total_instances"] == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{INSTANCES}/one"),
        ("PATCH", INSTANCES),
        ("PUT", INSTANCES),
        ("DELETE", f"{INSTANCES}/one/log"),
        ("POST", "/health"),
    ],
)
def test_method_that_is_none(shared: Daemon, method: str, path: str) -> None:
    assert shared.http.request(method, path).status_code == 405
