"""v1: one instance, its pid, its states and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES, problems, raw

V1 = "/v1/vllm"
MODEL = {"options": "--model m"}


def start(daemon: Daemon, **fields: Any) -> int:
    reply = daemon.http.post(V1, json={**MODEL, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.json()["status"] == "started"
    assert set(reply.json()) == {"status", "pid"}
    return int(reply.json()["pid"])


def stop(daemon: Daemon) -> int:
    reply = daemon.http.delete(V1)
    assert reply.status_code == 200, reply.text
    assert reply.json()["status"] == "terminated"
    assert set(reply.json()) == {"status", "pid"}
    return int(reply.json()["pid"])


def test_before_anything_was_created(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    for call in (daemon.http.get, daemon.http.delete):
        assert call(V1).status_code == 404
        assert isinstance(call(V1).json()["detail"], str)


def test_life_of_the_instance(shared: Daemon) -> None:
    pid = start(shared)
    assert shared.http.get(V1).json() == {"status": "started", "pid": pid}
    assert stop(shared) == pid
    assert not is_alive(pid)
    assert shared.http.get(V1).json() == {"status": "stopped", "pid": pid}
    assert shared.http.delete(V1).status_code == 404
    again = start(shared)
    assert again != pid
    assert shared.http.get(V1).json() == {"status": "started", "pid": again}


def test_pid_is_that_of_the_server_itself(shared: Daemon) -> None:
    pid = start(shared)
    shared.wait_state("default", "ready")
    port = urlsplit(shared.instance("default")["url"]).port
    listening = {link.laddr.port for link in psutil.Process(pid).net_connections() if link.status == psutil.CONN_LISTEN}
    assert listening == {port}
    assert f"Started server process [{pid}]" in shared.log("default")
    assert psutil.Process(pid).children(), "the engine child is a child of the process that was named"


def test_delete_takes_a_body(shared: Daemon) -> None:
    pid = start(shared)
    status, body = raw(shared, "DELETE", V1, b'{"anything": 1}')
    assert status == 200
    assert str(pid).encode() in body


def test_second_start_is_refused(shared: Daemon) -> None:
    pid = start(shared)
    reply = shared.http.post(V1, json={"options": "--model other"})
    assert reply.status_code == 409
    assert str(pid) in reply.json()["detail"]
    assert shared.http.get(V1).json() == {"status": "started", "pid": pid}


def test_start_after_it_ended_by_itself(shared: Daemon) -> None:
    pid = start(shared, env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.1"})
    wait_until(lambda: shared.http.get(V1).json() == {"status": "stopped", "pid": pid})
    assert shared.http.delete(V1).status_code == 404
    again = start(shared)
    assert again != pid
    assert shared.http.get(V1).json() == {"status": "started", "pid": again}


def test_starts_at_once_after_it_ended_by_itself(shared: Daemon) -> None:
    pid = start(shared, env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.1"})
    wait_until(lambda: shared.http.get(V1).json()["status"] == "stopped")
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: httpx.post(shared.url + V1, json=MODEL, timeout=30), range(4)))
    assert sorted(reply.status_code for reply in replies) == [200, 409, 409, 409], [reply.text for reply in replies]
    assert shared.http.get(V1).json()["pid"] != pid


def test_two_starts_at_once(shared: Daemon) -> None:
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: httpx.post(shared.url + V1, json=MODEL, timeout=30), range(2)))
    assert sorted(reply.status_code for reply in replies) == [200, 409]


def test_default_that_v2_owns(shared: Daemon) -> None:
    pid = shared.create(instance_id="default")["pid"]
    reply = shared.http.post(V1, json=MODEL)
    assert reply.status_code == 409
    assert "default" in reply.json()["detail"]
    assert str(pid) not in shared.http.get(V1).text, "v1 shows only what v1 made"
    assert shared.http.delete(V1).status_code == 404
    assert shared.instance("default")["status"] == "running"


def test_v2_sees_what_v1_made(shared: Daemon) -> None:
    pid = start(shared)
    assert shared.instance("default")["pid"] == pid
    assert shared.http.put(f"{INSTANCES}/default", json=MODEL).status_code == 409
    assert shared.delete("default")["pid"] == pid
    assert shared.http.get(V1).json() == {"status": "stopped", "pid": pid}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "options"]),
        ({"options": 5}, ["body", "options"]),
        ({"options": "--model 'm"}, ["body", "options"]),
        ({"options": "--port 8005"}, ["body", "options"]),
        ({"options": "--model m", "env_vars": {"A=B": "1"}}, ["body", "env_vars"]),
        ({"options": "--model m", "annotations": {}}, ["body", "annotations"]),
    ],
)
def test_bad_body(shared: Daemon, body: dict[str, Any], place: list[str]) -> None:
    assert problems(shared.http.post(V1, json=body))[0]["loc"] == place
    assert shared.http.delete(V1).status_code == 404, "nothing was started"


def test_over_restarts_of_the_daemon(
    start_daemon: Callable[..., Daemon], outliving: Callable[[int], psutil.Process]
) -> None:
    """The instance and its last pid survive a crash of the daemon; neither outlives a graceful end."""
    first = start_daemon().wait_warm()
    pid = start(first)
    outliving(pid)
    first.kill()
    second = start_daemon(first.state_dir)
    assert second.http.get(V1).json() == {"status": "started", "pid": pid}
    assert stop(second) == pid
    second.kill()
    third = start_daemon(first.state_dir).wait_warm()
    assert third.http.get(V1).json() == {"status": "stopped", "pid": pid}
    start(third)
    assert third.end() == 0
    fourth = start_daemon(first.state_dir)
    assert fourth.http.get(V1).status_code == 404


def test_a_refused_start_keeps_the_log_of_the_one_before(daemon: Daemon) -> None:
    """What has failed keeps its log until it is deleted, or replaced by one that starts."""
    body = {"options": "--model m", "env_vars": {"BULLPEN_SIM_FAIL": "start"}}
    assert daemon.http.post("/v1/vllm", json=body).status_code == 200
    daemon.wait_state("default", "failed")
    log = "/v2/vllm/instances/default/log"
    assert daemon.http.post("/v1/vllm", json={"options": "--model m --port abc"}).status_code == 422
    assert "Traceback" in daemon.http.get(log).text
    assert daemon.http.post("/v1/vllm", json={"options": "--model m"}).status_code == 200
    assert "Traceback" not in daemon.http.get(log).text
