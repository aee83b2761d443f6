"""Sleepers under a real daemon: its end, the ladder's time, host memory, requests, strangers on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.sleepers import QUESTION, SIM, Start, agree, ask, create, do, done, is_settled, notes, stage_of, states
from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call, held, says, trees

# -- the daemon's end -------------------------------------------------------------------------------------------------


def test_sigterm_leaves_no_sleeper(start: Start) -> None:
    """The daemon's end is the end of its sleepers, soon and entirely."""
    daemon = start(stop_timeout=20)
    stubborn = {"BULLPEN_SIM_STUBBORN": "2"}
    for gpu, (name, level) in enumerate((("one", 1), ("two", 2), ("stubborn", 1))):
        create(daemon, name, gpu, env_vars=stubborn if name == "stubborn" else {})
        done(daemon, name, "sleep", level=level)
    create(daemon, "emulated", 3, sleep="emulate")
    done(daemon, "emulated", "sleep")
    assert len(trees(daemon.state_dir)) == 3
    began = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - began < 20, "a sleeper was given time to finish what it cannot have begun"
    assert trees(daemon.state_dir) == {}
    assert not any(held(daemon.state_dir).values())
    assert not list((daemon.state_dir / "logs").glob("[0-9a-f]*.log"))


# -- the ladder -------------------------------------------------------------------------------------------------------


def test_the_ladder_by_time(start: Start) -> None:
    """Level 1, level 2, stopped: each in its turn, with its reason; a wake starts it again."""
    daemon = start()
    ladder = {"sleep_after": 0.3, "discard_after": 0.6, "stop_after": 0.9}
    create(daemon, "idle", 0, **ladder)
    create(daemon, "pinned", 1, **ladder, pin=True)
    seen: list[Any] = []
    deadline = time.monotonic() + 20
    while seen[-1:] != ["stopped"] and time.monotonic() < deadline:
        now = states(daemon)["idle"]
        if seen[-1:] != [now]:
            seen.append(now)
        time.sleep(0.01)
    assert seen == ["ready", 1, 2, "stopped"]
    assert states(daemon)["pinned"] == "ready"
    steps = [text for text in notes(daemon, "idle") if text.startswith("goes to sleep")]
    assert steps == [
        "goes to sleep (level 1): no request for 0.3 s",
        "goes to sleep (level 2): no request for 0.6 s",
        "goes to sleep (no process): no request for 0.9 s",
    ]
    agree(daemon)
    assert done(daemon, "idle", "wake")["state"] == "ready"


def test_requests_keep_it_awake(start: Start) -> None:
    """As long as requests come it stays; when they end, its time begins."""
    daemon = start()
    url = create(daemon, "busy", 0, sleep_after=0.8)["url"]
    end = time.monotonic() + 2.4
    while time.monotonic() < end:
        assert ask(url).status_code == 200
        assert states(daemon) == {"busy": "ready"}
        time.sleep(0.1)
    daemon.wait_state("busy", "sleeping")


def test_a_long_request_keeps_it_awake(start: Start, helpers: ThreadPoolExecutor) -> None:
    """A request in flight is use, however long it takes."""
    daemon = start()
    url = create(daemon, "busy", 0, sleep_after=0.3, env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": "10"})["url"]
    long = helpers.submit(ask, url, max_tokens=15)
    while not long.done():
        assert states(daemon) == {"busy": "ready"} or long.done()
        time.sleep(0.05)
    assert long.result().status_code == 200
    daemon.wait_state("busy", "sleeping")


# -- host memory ------------------------------------------------------------------------------------------------------


def test_the_host_memory_budget(start: Start) -> None:
    """A sleeper for which there is no room goes deeper until there is, and says why; who is awake is left alone."""
    daemon = start(host_memory_budget=1)
    create(daemon, "awake", 0, priority=1)
    create(daemon, "asleep", 1, priority=5)
    done(daemon, "asleep", "sleep")
    wait_until(lambda: is_settled(daemon) and states(daemon)["asleep"] == "stopped", 20, lambda: str(states(daemon)))
    assert any("1 are allowed" in text for text in notes(daemon, "asleep"))
    assert states(daemon)["awake"] == "ready"
    agree(daemon)
    assert done(daemon, "asleep", "wake")["state"] == "ready"


def test_the_right_sleeper_makes_room(start: Start, tmp_path: Path) -> None:
    """Where all but one fit, the one of lowest priority goes deeper: not the oldest and not the last to come."""
    priorities = {"dear": 5, "cheap": 1, "middle": 3}
    first = start(tmp_path / "state")
    for gpu, (name, priority) in enumerate(priorities.items()):
        create(first, name, gpu, priority=priority)
    for name in priorities:
        done(first, name, "sleep")
    wait_until(lambda: all("level_1" in first.instance(name).get("memory", {}) for name in priorities))
    kept = first.http.get("/v2/vllm/gpus").json()["host"]["asleep_mib"]
    assert kept > 0
    first.kill()
    daemon = start(tmp_path / "state", host_memory_budget=kept - 1)
    wait_until(lambda: is_settled(daemon) and states(daemon)["cheap"] != 1, 20, lambda: str(states(daemon)))
    assert states(daemon)["cheap"] in (2, "stopped")
    assert (states(daemon)["dear"], states(daemon)["middle"]) == (1, 1)
    assert any("host memory" in text and "lowest priority" in text for text in notes(daemon, "cheap"))
    host = daemon.http.get("/v2/vllm/gpus").json()["host"]
    assert 0 < host["asleep_mib"] <= host["budget_mib"]
    agree(daemon)


# -- requests ---------------------------------------------------------------------------------------------------------


def stream(url: str, tokens: int) -> list[str]:
    """All lines of a streamed completion."""
    body = {**QUESTION, "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as reply:
        assert reply.status_code == 200
        return [line for line in reply.iter_lines() if line]


def wait_in_flight(url: str) -> None:
    """Wait until a request is."""
    wait_until(lambda: call(f"{url}/bullpen/gate")[1]["in_flight"] == 1)


def test_a_stream_ends_before_the_sleep(start: Start, helpers: ThreadPoolExecutor) -> None:
    """It comes whole, and the instance sleeps after it."""
    daemon = start()
    url = create(daemon, "slow", 0, env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": "20"})["url"]
    running = helpers.submit(stream, url, 20)
    wait_in_flight(url)
    assert done(daemon, "slow", "sleep")["state"] == "sleeping"
    assert running.done() or running.result(1), "it slept before the stream had ended"
    lines = running.result()
    assert lines[-1] == "data: [DONE]"
    finished = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert "length" in finished
    assert "abort" not in finished


def test_a_drain_cuts_off_at_its_end(start: Start, helpers: ThreadPoolExecutor) -> None:
    """A request that takes longer than the drain is ended, and the instance says how many were."""
    daemon = start()
    url = create(daemon, "slow", 0, env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": "2"})["url"]
    running = helpers.submit(stream, url, 100)
    wait_in_flight(url)
    assert done(daemon, "slow", "sleep", drain=0.2)["state"] == "sleeping"
    assert running.result(10)
    assert any("1 requests were cut off after 0.2 s" in text for text in notes(daemon, "slow"))
    agree(daemon)


def test_a_held_request_is_answered_after_the_wake(start: Start, helpers: ThreadPoolExecutor) -> None:
    """It waits as long as the sleep lasts, and is answered as if nothing had been."""
    daemon = start()
    url = create(daemon, "one", 0)["url"]
    before = ask(url).json()["choices"]
    done(daemon, "one", "sleep")
    waiting: Future[httpx.Response] = helpers.submit(ask, url)
    wait_until(lambda: call(f"{url}/bullpen/gate")[1]["held"] == 1)
    time.sleep(0.2)
    assert not waiting.done()
    done(daemon, "one", "wake")
    reply = waiting.result(10)
    assert reply.status_code == 200
    assert reply.json()["choices"] == before


def test_a_request_is_refused_where_so_asked(start: Start) -> None:
    """503 with a time to try again; after the wake it is answered."""
    daemon = start()
    url = create(daemon, "one", 0)["url"]
    done(daemon, "one", "sleep", new_requests="refuse")
    reply = ask(url)
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "service_unavailable")
    assert int(reply.headers["retry-after"]) > 0
    done(daemon, "one", "wake")
    assert ask(url).status_code == 200


# -- strangers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that belongs to no instance."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait(10)


def take(daemon: Daemon, gpu: int, pid: int, mib: int) -> None:
    """Let a process hold memory on a mock GPU."""
    (daemon.state_dir / "mock-gpus" / str(gpu) / str(pid)).write_text(f"{mib}\n")


def test_a_stranger_on_the_gpu(start: Start, stranger: subprocess.Popen[bytes]) -> None:
    """A start and a wake wait for the memory, fail with a sentence that names the process, and work once it is gone."""
    daemon = start(memory_timeout=0.6)
    create(daemon, "known", 0)  # what it needs is measured now
    wait_until(lambda: "awake" in daemon.instance("known").get("memory", {}))
    done(daemon, "known", "sleep")
    wait_until(lambda: "level_1" in daemon.instance("known").get("memory", {}))
    take(daemon, 0, stranger.pid, 1200)
    began = time.monotonic()
    reply = do(daemon, "known", "wake")
    assert time.monotonic() - began >= 0.6, "it did not wait"
    assert reply.status_code == 409
    assert f"process {stranger.pid}" in reply.json()["detail"]
    assert "of no instance" in reply.json()["detail"]
    assert states(daemon) == {"known": 1}
    foreign = daemon.http.get("/v2/vllm/gpus").json()["gpus"][0]["foreign"]
    assert [(one["pid"], one["mib"]) for one in foreign] == [(stranger.pid, 1200)]
    variables = dict(SIM)
    body = {"options": "--model m", "gpu_uuids": ["0"], "env_vars": variables}
    created = daemon.http.put("/v2/vllm/instances/new", json=body)
    assert created.status_code == 409, created.text
    assert f"process {stranger.pid}" in created.json()["detail"]
    assert "new" not in states(daemon)
    stranger.kill()
    stranger.wait(10)
    assert done(daemon, "known", "wake")["state"] == "ready"
    agree(daemon)


def test_a_wake_waits_for_a_stranger_to_go(
    start: Start, helpers: ThreadPoolExecutor, stranger: subprocess.Popen[bytes]
) -> None:
    """Memory that comes back in time is all that a wake needs; meanwhile it says what it waits for."""
    daemon = start(memory_timeout=20)
    create(daemon, "known", 0)
    wait_until(lambda: "awake" in daemon.instance("known").get("memory", {}))
    done(daemon, "known", "sleep")
    take(daemon, 0, stranger.pid, 1200)
    waking = helpers.submit(call, f"{daemon.url}/v2/vllm/instances/known/wake", "POST")
    wait_until(lambda: stage_of(daemon, "known") == "wake: waiting for memory")
    os.kill(stranger.pid, 9)
    stranger.wait(10)
    assert waking.result(20)[0] == 200
    assert says(daemon.instance("known")) == (False, "open")
    agree(daemon)
