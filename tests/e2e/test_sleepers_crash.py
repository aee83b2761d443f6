"""A crash of the daemon while instances sleep, or are about to: the next one knows each for what it is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.sleepers import SIM, Start, agree, ask, create, done, is_settled, notes, stage_of, states
from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call


def leave(daemon: Daemon, method: str, path: str, body: object = None) -> None:
    """Make a call without waiting for its answer."""
    with suppress(OSError):
        call(f"{daemon.url}{path}", method, body, seconds=0.05)


def swap(daemon: Daemon, **body: Any) -> httpx.Response:
    """Swap."""
    return daemon.http.post("/v2/vllm/swap", json=body)


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
