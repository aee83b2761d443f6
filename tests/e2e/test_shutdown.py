"""SIGTERM: with streams open and servers that will not end, all is stopped in time and nothing is left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive, processes_of

STOP_SECONDS = 2.0


def read_to_end(url: str, path: str, ended: threading.Event, opened: threading.Semaphore) -> None:
    """Hold a stream open until the server ends it."""
    with httpx.Client(base_url=url, timeout=60) as client, client.stream("GET", path) as stream:
        opened.release()
        for _ in stream.iter_raw():
            pass
    ended.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left(start_daemon: Callable[..., Daemon], number: signal.Signals) -> None:
    """Open watches, followed logs, a streamed completion, and a stubborn server among the instances."""
    daemon = start_daemon(stop_timeout=STOP_SECONDS).wait_warm()
    pids = {
        name: daemon.create(instance_id=name, env_vars={"BULLPEN_SIM_STUBBORN": stubborn})["pid"]
        for name, stubborn in (("meek", 0), ("stubborn", 2))
    }
    url = daemon.wait_state("meek", "ready")["url"]
    daemon.wait_state("stubborn", "ready")
    zygote = daemon.http.get("/ready").json()["zygotes"][0]["pid"]
    wait_until(lambda: len(psutil.Process(zygote).children()) > len(pids), 10)
    forked = [process.pid for process in psutil.Process(zygote).children()]
    assert set(forked) > set(pids.values()), "a spare waits beside the servers"
    opened = threading.Semaphore(0)
    streams = [
        "/v2/vllm/instances/watch",
        "/v2/vllm/instances/watch?events=all",
        "/v2/vllm/instances/stubborn/log?follow=true",
    ]
    ended = [threading.Event() for _ in streams]
    for path, event in zip(streams, ended, strict=True):
        threading.Thread(target=read_to_end, args=(daemon.url, path, event, opened), daemon=True).start()
    for _ in streams:
        assert opened.acquire(timeout=10)
    completion = httpx.Client(timeout=30)
    body = {"model": "m", "prompt": "x", "max_tokens": 100_000, "stream": True}
    with completion.stream("POST", f"{url}/v1/completions", json=body) as answer:
        next(answer.iter_raw())
        started = time.monotonic()
        code = daemon.end(number)
        seconds = time.monotonic() - started
    assert code == 0, "".join(daemon.output)
    assert seconds < STOP_SECONDS + 3, f"it took {seconds:.1f} s"
    assert all(event.wait(5) for event in ended)
    left = {pid: line for name, pid in pids.items() for pid, line in processes_of(name, pid).items()}
    assert not left
    assert not is_alive(zygote)
    assert not [pid for pid in forked if is_alive(pid)]
    names = {path.name for path in daemon.state_dir.rglob("*") if not path.is_dir()}
    assert names <= {"daemon.pid", "journal.sqlite", "zygote-sim.log"}, "something is left behind"


def test_the_counter_goes_on_and_records_do_not(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """After a graceful end the next daemon knows the counter, and no instance."""
    first = start_daemon(tmp_path / "state").wait_warm()
    first.create(instance_id="done", env_vars={"BULLPEN_SIM_EXIT_AFTER": 0.05})
    first.wait_state("done", "stopped", "failed")
    revision = first.http.get("/v2/vllm/instances").json()["revision"]
    assert first.end() == 0
    second = start_daemon(tmp_path / "state")
    listed = second.http.get("/v2/vllm/instances").json()
    assert listed["instances"] == []
    assert listed["revision"] == revision + 1, "the end of the first one removed the record"


def test_keep_leaves_the_instances(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """With --on-exit keep the servers live on and the next daemon has them."""
    first = start_daemon(tmp_path / "state", on_exit="keep").wait_warm()
    pid = first.create(instance_id="kept")["pid"]
    first.wait_state("kept", "ready")
    assert first.end() == 0
    assert is_alive(pid)
    second = start_daemon(tmp_path / "state")
    assert second.instance("kept")["state"] == "ready"
    assert second.end() == 0
    wait_until(lambda: not processes_of("kept", pid), 5)


def test_a_create_that_waits_is_answered(start_daemon: Callable[..., Daemon]) -> None:
    """SIGTERM while the engine is still being imported: the caller hears why, and the daemon ends."""
    daemon = start_daemon(engine="vllm")
    outcome: list[int] = []

    def create() -> None:
        outcome.append(
            httpx.post(f"{daemon.url}/v2/vllm/instances", json={"options": "--model m"}, timeout=60).status_code
        )

    caller = threading.Thread(target=create)
    caller.start()
    wait_until(lambda: daemon.http.get("/ready").json()["waiting"] == 1, 20)
    assert daemon.end() == 0
    caller.join(10)
    assert outcome == [500]
