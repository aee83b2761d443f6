"""Sleepers under a real daemon: its crashes, its end, the ladder's time, host memory, requests, strangers on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call, compare, held, says, trees

AWAKE_MIB, ASLEEP_MIB = 1000, 64
SIM = {"BULLPEN_SIM_AWAKE_MIB": str(AWAKE_MIB), "BULLPEN_SIM_ASLEEP_MIB": str(ASLEEP_MIB)}
SMALL_GPU = 1500
"""MiB: room for one that is awake and a few sleepers."""
QUESTION = {"model": "m", "prompt": "hello", "max_tokens": 4}

Start = Callable[..., Daemon]


@pytest.fixture
def start(start_daemon: Start) -> Start:
    """Start daemons with small mock GPUs."""

    def begin(*arguments: Any, **settings: Any) -> Daemon:
        settings = {"mock_gpus": 1, "mock_gpu_memory": SMALL_GPU, "sleep_timeout": 5, "wake_timeout": 5, **settings}
        return start_daemon(*arguments, **settings).wait_warm()

    return begin


@pytest.fixture
def helpers() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def create(daemon: Daemon, name: str, gpu: int, **fields: Any) -> dict[str, Any]:
    """Create an instance that serves `m` on one GPU, and wait until it is ready."""
    variables = {**SIM, **fields.pop("env_vars", {})}
    daemon.create(instance_id=name, env_vars=variables, gpu_uuids=[str(gpu)], **fields)
    return daemon.wait_state(name, "ready")


def do(daemon: Daemon, name: str, verb: str, **query: Any) -> httpx.Response:
    """Sleep or wake."""
    return daemon.http.post(f"/v2/vllm/instances/{name}/{verb}", params=query)


def done(daemon: Daemon, name: str, verb: str, **query: Any) -> dict[str, Any]:
    """The same; it must succeed."""
    reply = do(daemon, name, verb, **query)
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


def leave(daemon: Daemon, method: str, path: str, body: object = None) -> None:
    """Make a call without waiting for its answer."""
    with suppress(OSError):
        call(f"{daemon.url}{path}", method, body, seconds=0.05)


def swap(daemon: Daemon, **body: Any) -> httpx.Response:
    """Swap."""
    return daemon.http.post("/v2/vllm/swap", json=body)


def ask(url: str, seconds: float = 20.0, **fields: Any) -> httpx.Response:
    """A completion."""
    return httpx.post(f"{url}/v1/completions", json={**QUESTION, **fields}, timeout=seconds)


def notes(daemon: Daemon, name: str) -> list[str]:
    """What was decided about an instance."""
    return [note["text"] for note in daemon.http.get(f"/v2/vllm/instances/{name}/explain").json()["notes"]]


def is_settled(daemon: Daemon) -> bool:
    """Whether nothing is under way."""
    listed = daemon.http.get("/v2/vllm/instances").json()["instances"]
    return all("activity" not in one and one["state"] not in ("starting", "stopping") for one in listed)


def agree(daemon: Daemon, seconds: float = 10.0) -> None:
    """Wait until the book is equal to reality."""
    wait_until(lambda: not wrong(daemon), seconds, lambda: str(wrong(daemon)))


def wrong(daemon: Daemon) -> list[str]:
    """What is wrong with the book."""
    return compare(daemon.url, daemon.state_dir, AWAKE_MIB, ASLEEP_MIB)


def states(daemon: Daemon) -> dict[str, Any]:
    """Each instance's state; of a sleeper, how it sleeps."""
    listed = daemon.http.get("/v2/vllm/instances").json()["instances"]
    return {
        one["instance_id"]: "emulated" if one.get("sleep_emulated") else one.get("sleep_level", one["state"])
        for one in listed
    }


def stage_of(daemon: Daemon, name: str) -> str:
    """What is being done with an instance."""
    activity = daemon.instance(name).get("activity")
    return f"{activity['doing']}: {activity['stage']}" if activity else ""


# -- the daemon's crash -----------------------------------------------------------------------------------------------


def test_sleepers_of_each_kind_survive_a_crash(start: Start, tmp_path: Path) -> None:
    """The next daemon knows each for what it is, wakes nobody by mistake, and can wake all."""
    first = start(tmp_path / "state")
    pids = {name: create(first, name, gpu)["pid"] for gpu, name in enumerate(("one", "two"))}
    create(first, "emulated", 2, sleep="emulate")
    create(first, "stopped", 3, stop_after=0.2)
    create(first, "awake", 4)
    before = {name: ask(first.instance(name)["url"]).json()["choices"] for name in ("one", "two", "emulated")}
    done(first, "one", "sleep")
    done(first, "two", "sleep", level=2)
    done(first, "emulated", "sleep")
    first.wait_state("stopped", "stopped")
    agree(first)
    expected = {"one": 1, "two": 2, "emulated": "emulated", "stopped": "stopped", "awake": "ready"}
    assert states(first) == expected
    reasons = {name: notes(first, name) for name in expected}
    first.kill()

    second = start(tmp_path / "state")
    wait_until(lambda: is_settled(second))
    agree(second)
    assert states(second) == expected
    assert {name: second.instance(name)["pid"] for name in pids} == pids
    assert {name: notes(second, name) for name in expected} == reasons, "nothing was decided about them anew"
    for name in expected:
        assert done(second, name, "wake")["state"] == "ready"
    assert {name: second.instance(name)["pid"] for name in pids} == pids
    assert {name: ask(second.instance(name)["url"]).json()["choices"] for name in before} == before
    agree(second)


def test_a_crash_in_the_middle_of_a_drain(start: Start, helpers: ThreadPoolExecutor, tmp_path: Path) -> None:
    """The gate was closed and nothing else done: it is opened, and what it held is answered."""
    first = start(tmp_path / "state")
    url = create(first, "slow", 0, env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": "10"})["url"]
    long = helpers.submit(ask, url, max_tokens=25)
    wait_until(lambda: call(f"{url}/bullpen/gate")[1]["in_flight"] == 1)
    leave(first, "POST", "/v2/vllm/instances/slow/sleep")
    wait_until(lambda: call(f"{url}/bullpen/gate")[1]["mode"] == "hold")
    waiting = helpers.submit(ask, url)
    wait_until(lambda: call(f"{url}/bullpen/gate")[1]["held"] == 1)
    first.kill()

    second = start(tmp_path / "state")
    wait_until(lambda: is_settled(second))
    assert states(second) == {"slow": "ready"}
    assert waiting.result().status_code == 200
    assert long.result().status_code == 200
    agree(second)
    assert done(second, "slow", "sleep")["sleep_level"] == 1


@pytest.mark.parametrize("slept_before", [False, True])
def test_a_crash_in_the_middle_of_a_sleep(start: Start, tmp_path: Path, *, slept_before: bool) -> None:
    """How far the engine had come is not known, so it is woken; nobody had been told that it sleeps."""
    first = start(tmp_path / "state")
    pid = create(first, "drowsy", 0, env_vars={"BULLPEN_SIM_SLEEP_SECONDS": "1"})["pid"]
    if slept_before:
        done(first, "drowsy", "sleep")
        done(first, "drowsy", "wake")
    leave(first, "POST", "/v2/vllm/instances/drowsy/sleep")
    wait_until(lambda: stage_of(first, "drowsy") == "sleep: telling the engine")
    time.sleep(0.3)
    first.kill()

    second = start(tmp_path / "state")
    wait_until(lambda: is_settled(second))
    assert states(second) == {"drowsy": "ready"}
    agree(second)
    document = second.instance("drowsy")
    assert document["pid"] == pid
    assert ask(document["url"]).status_code == 200
    assert done(second, "drowsy", "sleep")["sleep_level"] == 1
    agree(second)


@pytest.mark.parametrize("level", [1, 2])
def test_a_crash_in_the_middle_of_a_wake(start: Start, tmp_path: Path, level: int) -> None:
    """What was asked to wake is awake under the next daemon, and answers."""
    first = start(tmp_path / "state")
    pid = create(first, "morning", 0, env_vars={"BULLPEN_SIM_WAKE_SECONDS": "0.5"})["pid"]
    done(first, "morning", "sleep", level=level)
    leave(first, "POST", "/v2/vllm/instances/morning/wake")
    wait_until(lambda: stage_of(first, "morning") == "wake: telling the engine")
    first.kill()

    second = start(tmp_path / "state")
    wait_until(lambda: is_settled(second))
    assert states(second) == {"morning": "ready"}
    agree(second)
    document = second.instance("morning")
    assert ask(document["url"]).status_code == 200
    assert document["pid"] == pid


def test_a_crash_in_the_middle_of_an_emulated_sleep_and_wake(start: Start, tmp_path: Path) -> None:
    """A process that was to end ends; one that was starting again becomes ready."""
    first = start(tmp_path / "state")
    create(first, "end", 0, sleep="emulate", env_vars={"BULLPEN_SIM_STUBBORN": "2"})
    create(first, "begin", 1, sleep="emulate", env_vars={"BULLPEN_SIM_START_SECONDS": "2"})
    done(first, "begin", "sleep")
    leave(first, "POST", "/v2/vllm/instances/begin/wake")
    wait_until(lambda: stage_of(first, "begin") == "wake: starting")
    leave(first, "POST", "/v2/vllm/instances/end/sleep")
    wait_until(lambda: states(first)["end"] == "emulated" or stage_of(first, "end") == "sleep: ending the process")
    first.kill()

    second = start(tmp_path / "state")
    wait_until(lambda: is_settled(second))
    assert states(second) == {"end": "emulated", "begin": "ready"}
    agree(second)


@pytest.mark.parametrize("moment", ["out", "in", "new"])
def test_a_crash_in_the_middle_of_a_swap(start: Start, tmp_path: Path, moment: str) -> None:
    """The next daemon takes it back: what was awake is, what slept sleeps, what was created is gone."""
    first = start(tmp_path / "state")
    slow = {"out": {"BULLPEN_SIM_SLEEP_SECONDS": "0.7"}, "in": {"BULLPEN_SIM_WAKE_SECONDS": "0.7"}}
    sleeper = create(first, "b", 0, env_vars=slow.get(moment, {}))["pid"]
    done(first, "b", "sleep")
    old = create(first, "a", 0, env_vars=slow.get(moment, {}))["pid"]
    incoming: Any = "b"
    if moment == "new":
        variables = {**SIM, "BULLPEN_SIM_START_SECONDS": "2"}
        incoming = {"instance_id": "c", "options": "--model c", "gpu_uuids": ["0"], "env_vars": variables}
    leave(first, "POST", "/v2/vllm/swap", {"in": incoming, "out": "a"})
    waited = {
        "out": ("a", "sleep: telling the engine"),
        "in": ("b", "wake: telling the engine"),
        "new": ("c", "start: starting"),
    }
    name, stage = waited[moment]
    wait_until(lambda: name in states(first) and stage_of(first, name) == stage)
    first.kill()

    second = start(tmp_path / "state")
    wait_until(lambda: is_settled(second) and states(second) == {"a": "ready", "b": 1}, 20, lambda: str(states(second)))
    agree(second)
    assert second.instance("a")["pid"] == old
    assert second.instance("b")["pid"] == sleeper
    assert swap(second, **{"in": "b", "out": "a"}).status_code == 200
    agree(second)


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
