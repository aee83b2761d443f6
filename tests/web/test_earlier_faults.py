"""Nine faults that earlier implementations of this API had, each in the situation in which it was seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES, STOP_SECONDS, problems, tree, watching

MIB = 1024 * 1024


def stubborn(daemon: Daemon, count: int, level: int) -> list[int]:
    """Make instances that do not end at SIGTERM; return every pid of them."""
    for number in range(count):
        daemon.create(instance_id=f"stubborn-{number}", env_vars={"BULLPEN_SIM_STUBBORN": level})
    servers = [daemon.wait_state(f"stubborn-{number}", "ready")["pid"] for number in range(count)]
    return [process.pid for pid in servers for process in tree(pid)]


def test_1_a_stop_blocks_nobody_and_all_are_stopped_side_by_side(shared: Daemon) -> None:
    stubborn(shared, 4, level=2)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        delete_all = pool.submit(httpx.delete, shared.url + INSTANCES, timeout=60)
        slowest, answers = 0.0, 0
        while not delete_all.done():
            asked = time.monotonic()
            assert shared.http.get("/health").json() == {"status": "OK"}
            slowest, answers = max(slowest, time.monotonic() - asked), answers + 1
            time.sleep(0.01)
        took = time.monotonic() - began
    assert delete_all.result().json()["total_stopped"] == 4
    assert took < 2 * STOP_SECONDS, "one after the other takes four times the stop timeout"
    assert answers > 20
    assert slowest < STOP_SECONDS / 2


def test_2_delete_answers_when_the_engines_child_is_gone_too(shared: Daemon) -> None:
    pids = stubborn(shared, 1, level=1)
    assert len(pids) == 2
    assert shared.delete("stubborn-0")["status"] == "terminated"
    assert not [pid for pid in pids if is_alive(pid)]


def test_3_sigterm_stops_the_instances_although_a_watch_is_open(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(stop_timeout=STOP_SECONDS).wait_warm()
    pids = stubborn(daemon, 2, level=1)
    with watching(daemon) as watch, watching(daemon, events="all"):
        assert daemon.end() == 0
        watch.wait_end()
    assert not [pid for pid in pids if is_alive(pid)]


def test_4_options_that_cannot_start_are_refused_and_later_failures_keep_their_reason(shared: Daemon) -> None:
    for options in ("", "--port 8000", "--model m --port eight", "--model m --hf-overrides {"):
        (problem,) = problems(shared.http.post(INSTANCES, json={"options": options}))
        assert problem["msg"]
    shared.create(instance_id="bad", env_vars={"BULLPEN_SIM_FAIL": "start"})
    failed = shared.wait_state("bad", "failed")
    assert failed["error"]["message"]
    assert "Traceback" in shared.log("bad")


def test_5_options_are_split_as_a_shell_does(shared: Daemon) -> None:
    shared.create("""--model m --hf-overrides '{"rope_scaling": {"factor": 2}}'""", instance_id="json")
    shared.wait_state("json", "ready")
    assert """'hf_overrides': '{"rope_scaling": {"factor": 2}}'""" in shared.log("json")


def test_6_every_process_of_the_tree_has_the_preload(shared: Daemon) -> None:
    """A forked process has its libraries where its parent has them; one that was started anew has them elsewhere."""
    (zygote,) = shared.http.get("/ready").json()["zygotes"]
    created = shared.create(instance_id="one")
    assert created["start"] in ("spare", "fork")
    shared.wait_state("one", "ready")
    processes = tree(created["pid"])
    assert len(processes) > 1
    assert {libraries(process.pid) for process in processes} == {libraries(zygote["pid"])}
    assert libraries(zygote["pid"]) != libraries(shared.pid), "what this test relies on"


def libraries(pid: int) -> str:
    """Where a process has the C library."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.split()[0] for line in maps if "/libc." in line or "/libc-" in line or "/ld-musl" in line)


def test_7_secrets_do_not_come_back_and_a_key_can_be_set(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(access_key="k")
    daemon.http.headers["Authorization"] = "Bearer k"
    daemon.wait_warm()
    assert httpx.get(daemon.url + INSTANCES).status_code == 401
    created = daemon.create("--model m --api-key s3cr3t", env_vars={"HF_TOKEN": "s3cr3t"})
    assert "s3cr3t" not in json.dumps(created) + daemon.http.get(INSTANCES).text


def test_8_a_killed_daemon_takes_no_model_along(
    start_daemon: Callable[..., Daemon], outliving: Callable[[int], psutil.Process]
) -> None:
    first = start_daemon().wait_warm()
    created = first.create(instance_id="warm")
    outliving(created["pid"])
    first.wait_state("warm", "ready")
    first.kill()
    models = httpx.get(f"{created['url']}/v1/models")
    assert models.status_code == 200, "it answers although nobody watches over it"
    second = start_daemon(first.state_dir)
    adopted = second.instance("warm")
    assert (adopted["state"], adopted["pid"], adopted["url"]) == ("ready", created["pid"], created["url"])


@pytest.mark.parametrize("wanted", ["bytes=0-3145727", "bytes=1-", "bytes=0-99999999"])
def test_9_an_explicit_range_is_capped(shared: Daemon, wanted: str) -> None:
    shared.create(instance_id="long", env_vars={"BULLPEN_SIM_LOG_BYTES": 3 * MIB})
    shared.wait_state("long", "ready")
    reply = shared.http.get(f"{INSTANCES}/long/log", headers={"Range": wanted})
    assert (reply.status_code, len(reply.content)) == (206, MIB)
