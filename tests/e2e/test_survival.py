"""Crashes of the daemon and of the zygote: nothing that lived is lost, nothing is said that is not so."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive, processes_of


def zygote_pid(daemon: Daemon) -> int:
    """The process of the daemon's zygote."""
    return int(daemon.http.get("/ready").json()["zygotes"][0]["pid"])


def completion(url: str) -> str:
    """An instance's answer."""
    reply = httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "hello", "max_tokens": 4}, timeout=20)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_a_new_daemon_adopts_what_lives(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """kill -9 of the daemon: servers go on under their pids, the next one knows them, logs and revisions go on."""
    first = start_daemon(tmp_path / "state").wait_warm()
    pids = {name: first.create(instance_id=name, annotations={"a": name})["pid"] for name in ("one", "two", "gone")}
    documents = {name: first.wait_state(name, "ready") for name in pids}
    before = completion(documents["one"]["url"])
    revision = first.http.get("/v2/vllm/instances").json()["revision"]
    first.kill()
    assert completion(documents["one"]["url"]) == before
    os.kill(pids["gone"], signal.SIGKILL)
    wait_until(lambda: not is_alive(pids["gone"]))

    second = start_daemon(tmp_path / "state")
    listed = {one["instance_id"]: one for one in second.http.get("/v2/vllm/instances").json()["instances"]}
    assert {name: one["pid"] for name, one in listed.items()} == pids
    assert [listed[name]["state"] for name in ("one", "two")] == ["ready", "ready"]
    assert listed["one"]["annotations"] == {"a": "one"}
    gone = second.wait_state("gone", "stopped")
    assert (gone["status"], gone["exit_code"], gone["error"]["class"]) == ("stopped", None, "unknown")
    assert completion(listed["one"]["url"]) == before
    assert "simulator" in second.log("one")
    with second.http.stream("GET", "/v2/vllm/instances/watch", params={"since": revision}) as stream:
        event = json.loads(next(stream.iter_lines()))
    assert (event["type"], event["object"]["instance_id"]) == ("STOPPED", "gone")
    assert event["object"]["revision"] == revision + 1
    second.wait_warm()
    assert second.delete("one")["status"] == "terminated"
    assert second.delete("gone")["status"] == "not_running"
    os.kill(pids["two"], signal.SIGKILL)
    assert second.wait_state("two", "stopped", "failed")["status"] == "stopped"
    wait_until(lambda: not processes_of("two", pids["two"]))


def test_logs_are_found_wherever_the_daemon_of_the_time_was_told_to_put_them(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    first = start_daemon(tmp_path / "state", log_dir=logs).wait_warm()
    first.create(instance_id="one")
    first.wait_state("one", "ready")
    (log,) = logs.iterdir()
    assert "simulator" in log.read_text() and re.fullmatch("one-[0-9a-f]{8}.log", log.name)
    first.kill()

    second = start_daemon(tmp_path / "state").wait_warm()
    assert second.log("one") == log.read_text()
    second.create(instance_id="two")
    second.wait_state("two", "ready")
    assert list(logs.iterdir()) == [log], "new ones go where this one was told"
    second.kill()

    third = start_daemon(tmp_path / "state", log_dir=tmp_path / "other").wait_warm()
    assert "simulator" in third.log("one") and "simulator" in third.log("two")
    assert third.delete("one")["status"] == "terminated"
    assert not log.exists()


def test_an_unfinished_start_is_adopted(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """A server that was still starting becomes ready under the next daemon."""
    first = start_daemon(tmp_path / "state").wait_warm()
    pid = first.create(instance_id="slow", env_vars={"BULLPEN_SIM_START_SECONDS": 3})["pid"]
    first.kill()
    second = start_daemon(tmp_path / "state")
    assert second.instance("slow")["state"] == "starting"
    document = second.wait_state("slow", "ready")
    assert document["pid"] == pid


def test_an_unfinished_stop_is_finished(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """A stop that was under way when the daemon died is carried through by the next one."""
    first = start_daemon(tmp_path / "state", stop_timeout=30).wait_warm()
    pid = first.create(instance_id="stubborn", env_vars={"BULLPEN_SIM_STUBBORN": 2})["pid"]
    first.wait_state("stubborn", "ready")
    deleting = httpx.Client(base_url=first.url, timeout=0.5)
    with suppress(httpx.ReadTimeout):
        deleting.delete("/v2/vllm/instances/stubborn")
    first.wait_state("stubborn", "stopping")
    first.kill()
    assert is_alive(pid)
    second = start_daemon(tmp_path / "state")
    wait_until(lambda: second.http.get("/v2/vllm/instances").json()["total_instances"] == 0)
    assert not processes_of("stubborn", pid)


def test_crash_while_creating_leaves_no_orphan(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """kill -9 of the daemon in the middle of a burst of creates: each process is either adopted or gone."""
    state = tmp_path / "state"
    for round_number in range(3):
        daemon = start_daemon(state).wait_warm()
        with httpx.Client(base_url=daemon.url, timeout=0.02 + 0.02 * round_number) as impatient:
            for number in range(8):
                try:
                    impatient.put(f"/v2/vllm/instances/burst-{round_number}-{number}", json={"options": "--model m"})
                except httpx.TimeoutException:
                    continue
        daemon.kill()
        after = start_daemon(state)
        known = {one["pid"] for one in after.http.get("/v2/vllm/instances").json()["instances"]}
        servers = {pid for number in range(8) for pid in processes_of(f"burst-{round_number}-{number}")}
        leaders = {pid for pid in servers if os.getsid(pid) == pid}
        assert leaders <= known
        after.end()
        assert not [pid for number in range(8) for pid in processes_of(f"burst-{round_number}-{number}")]


def test_a_killed_zygote_takes_nothing_along(daemon: Daemon) -> None:
    """kill -9 of the zygote: instances untouched, their exits still seen, a new one warms, creates wait for it."""
    pid = daemon.create(instance_id="kept")["pid"]
    url = daemon.wait_state("kept", "ready")["url"]
    old = zygote_pid(daemon)
    os.kill(old, signal.SIGKILL)
    created = daemon.create(instance_id="after")
    assert created["status"] == "started"
    assert completion(url)
    assert daemon.instance("kept")["pid"] == pid
    wait_until(lambda: daemon.http.get("/ready").status_code == 200)
    assert zygote_pid(daemon) != old
    os.kill(pid, signal.SIGKILL)
    document = daemon.wait_state("kept", "failed")
    assert document["exit_code"] == -9, "the daemon, its parent now, saw how it ended"


def test_a_second_daemon_on_the_same_state_is_refused(daemon: Daemon) -> None:
    """It ends with a message that names the first one's pid, and harms nothing."""
    daemon.create(instance_id="mine")
    second = Daemon(daemon.state_dir)
    second.wait_line(f"another Bullpen (pid {daemon.pid})")
    assert second.process.wait(20) == 2
    assert daemon.instance("mine")["status"] == "running"
