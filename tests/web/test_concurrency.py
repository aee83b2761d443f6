"""Callers at the same time: each gets an answer that fits the others', and nobody waits for a stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES, STOP_SECONDS, tree, unused_port, wait_for_child, watching

CALLERS = 6


def at_once(daemon: Daemon, calls: list[tuple[str, str, dict[str, object] | None]]) -> list[httpx.Response]:
    """Make calls as nearly at the same moment as threads can."""
    barrier = threading.Barrier(len(calls))

    def call(method: str, path: str, body: dict[str, object] | None) -> httpx.Response:
        with httpx.Client(base_url=daemon.url, timeout=30) as client:
            client.get("/health")
            barrier.wait(10)
            return client.request(method, path, json=body)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda arguments: call(*arguments), calls))


def codes(replies: list[httpx.Response]) -> list[int]:
    return sorted(reply.status_code for reply in replies)


@pytest.mark.parametrize("attempt", range(3))
def test_creates_under_one_id(shared: Daemon, attempt: int) -> None:
    replies = at_once(shared, [("PUT", f"{INSTANCES}/one", {"options": f"--model m{n}"}) for n in range(CALLERS)])
    assert codes(replies) == [201] + [409] * (CALLERS - 1)
    (created,) = [reply.json() for reply in replies if reply.status_code == 201]
    assert shared.instance("one")["model"] == created["model"]
    assert shared.http.get(INSTANCES).json()["total_instances"] == 1


def test_creates_on_one_port(shared: Daemon) -> None:
    options = f"--model m --port {unused_port()}"
    replies = at_once(shared, [("PUT", f"{INSTANCES}/i{n}", {"options": options}) for n in range(CALLERS)])
    assert codes(replies) == [201] + [409] * (CALLERS - 1)
    (winner,) = [reply.json()["instance_id"] for reply in replies if reply.status_code == 201]
    assert all(f"'{winner}'" in reply.json()["detail"] for reply in replies if reply.status_code == 409)
    shared.wait_state(winner, "ready")


def test_creates_on_one_gpu(shared: Daemon) -> None:
    body: dict[str, object] = {"options": "--model m", "gpu_uuids": ["GPU-0"]}
    replies = at_once(shared, [("PUT", f"{INSTANCES}/i{n}", body) for n in range(CALLERS)])
    assert codes(replies) == [201] + [409] * (CALLERS - 1)


def test_creates_that_do_not_meet(shared: Daemon) -> None:
    replies = at_once(shared, [("POST", INSTANCES, {"options": "--model m"}) for _ in range(CALLERS)])
    assert codes(replies) == [201] * CALLERS
    documents = [reply.json() for reply in replies]
    assert len({document["instance_id"] for document in documents}) == CALLERS
    assert len({document["url"] for document in documents}) == CALLERS
    assert len({document["pid"] for document in documents}) == CALLERS


@pytest.mark.parametrize("stubborn", ["0", "2"])
def test_deletes_of_one_instance(shared: Daemon, stubborn: str) -> None:
    created = shared.create(instance_id="one", env_vars={"BULLPEN_SIM_STUBBORN": stubborn})
    shared.wait_state("one", "ready")
    processes = tree(created["pid"])
    with watching(shared) as watch:
        replies = at_once(shared, [("DELETE", f"{INSTANCES}/one", None)] * 3)
        lines = watch.until("DELETED")
    assert set(codes(replies)) <= {200, 404}
    assert codes(replies)[0] == 200
    assert {reply.json()["status"] for reply in replies if reply.status_code == 200} == {"terminated"}
    assert not [process for process in processes if is_alive(process.pid)]
    assert [line["type"] for line in lines] == ["CREATED", "DELETED"], "it is told once"


def test_delete_of_one_and_of_all(shared: Daemon) -> None:
    for n in range(4):
        shared.create(instance_id=f"i{n}")
    replies = at_once(
        shared, [("DELETE", INSTANCES, None), ("DELETE", f"{INSTANCES}/i2", None), ("DELETE", INSTANCES, None)]
    )
    assert set(codes(replies)) <= {200, 404}
    assert shared.http.get(INSTANCES).json()["total_instances"] == 0


@pytest.mark.parametrize("attempt", range(3))
def test_create_and_delete_of_one_id(shared: Daemon, attempt: int) -> None:
    put, delete = at_once(
        shared, [("PUT", f"{INSTANCES}/one", {"options": "--model m"}), ("DELETE", f"{INSTANCES}/one", None)]
    )
    listed = shared.http.get(INSTANCES, params={"detail": 0}).json()["instance_ids"]
    assert (put.status_code, delete.status_code, listed) in [(201, 404, ["one"]), (201, 200, []), (409, 200, [])]


@pytest.fixture
def stopping(shared: Daemon) -> tuple[Daemon, Future[httpx.Response]]:
    """A daemon while it stops an instance, `stubborn`, that takes as long as it is given."""
    created = shared.create(instance_id="stubborn", env_vars={"BULLPEN_SIM_STUBBORN": "2"})
    shared.wait_state("stubborn", "ready")
    pool = ThreadPoolExecutor(1)
    delete = pool.submit(httpx.delete, f"{shared.url}{INSTANCES}/stubborn", timeout=30)
    pool.shutdown(wait=False)
    wait_until(lambda: shared.instance("stubborn")["state"] == "stopping")
    assert is_alive(created["pid"])
    return shared, delete


def test_others_are_served_while_one_stops(stopping: tuple[Daemon, Future[httpx.Response]]) -> None:
    daemon, delete = stopping
    assert daemon.http.get("/health").json() == {"status": "OK"}
    daemon.create(instance_id="other")
    daemon.wait_state("other", "ready")
    assert daemon.delete("other")["status"] == "terminated"
    assert daemon.http.get(f"{INSTANCES}/stubborn/log").status_code == 200
    assert not delete.done(), "all of that fitted into one stop"
    assert daemon.http.get(INSTANCES).json()["running_instances"] == 1
    assert delete.result(30).json()["status"] == "terminated"


def test_looks_stay_quick_while_one_stops(stopping: tuple[Daemon, Future[httpx.Response]]) -> None:
    daemon, delete = stopping
    longest, looks = 0.0, 0
    while not delete.done():
        began = time.monotonic()
        assert daemon.http.get(INSTANCES).status_code == 200
        longest, looks = max(longest, time.monotonic() - began), looks + 1
    assert looks > 50
    assert longest < STOP_SECONDS / 2


def test_id_is_taken_until_its_last_process_is_gone(stopping: tuple[Daemon, Future[httpx.Response]]) -> None:
    daemon, delete = stopping
    assert daemon.http.put(f"{INSTANCES}/stubborn", json={"options": "--model m"}).status_code == 409
    assert delete.result(30).status_code == 200
    assert daemon.create(instance_id="stubborn")["status"] == "started"


def test_deletes_of_instances_that_start(shared: Daemon) -> None:
    """In each phase of a start."""
    pids = []
    for seconds in (0, 0.05, 0.1, 0.2, 0.4):
        pids.append(shared.create(instance_id="one", env_vars={"BULLPEN_SIM_START_SECONDS": "0.4"})["pid"])
        time.sleep(seconds)
        assert shared.delete("one")["status"] == "terminated"
    assert not [pid for pid in pids if is_alive(pid)]


def test_caller_that_leaves_does_not_harm(start_daemon: Callable[..., Daemon]) -> None:
    """A create or a delete goes on when its caller has gone."""
    daemon = start_daemon(stop_timeout=1).wait_warm()
    created = daemon.create(instance_id="stubborn", env_vars={"BULLPEN_SIM_STUBBORN": "2"})
    child = wait_for_child(created["pid"])
    daemon.wait_state("stubborn", "ready")
    with pytest.raises(httpx.TimeoutException):
        httpx.delete(f"{daemon.url}{INSTANCES}/stubborn", timeout=0.2)
    wait_until(lambda: daemon.http.get(INSTANCES).json()["total_instances"] == 0)
    assert not is_alive(child.pid)
    assert psutil.Process(daemon.pid).is_running()
