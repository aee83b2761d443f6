"""How real servers end: asked to, killed, or bereft of a process; and what daemon and zygote survive."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.serving import (
    Asker,
    Models,
    complete,
    drain,
    engine_core,
    open_stream,
    serving,
    wait_gone,
    wait_ready,
)
from tests.support.daemon import Daemon, wait_until
from tests.support.processes import command_lines, is_alive, processes_of

Pair = dict[str, dict[str, Any]]
LONG_ANSWER = 20_000
"""Tokens: more than a test lasts."""


def long_options(models: Models) -> str:
    """A model that can talk for a long time."""
    return models.options("tiny-long", "--max-model-len", str(LONG_ANSWER + 1000))


def test_killed_server(daemon: Daemon, models: Models, pair: Pair) -> None:
    """kill -9 of the server: its engine core goes with it, the instance says so, its neighbour notices nothing."""
    with Asker(pair["tiny-a"]) as asker, serving(daemon, models.options("tiny-b"), "victim") as instance:
        core = engine_core(instance["pid"])
        os.kill(instance["pid"], signal.SIGKILL)
        document = daemon.wait_state("victim", "failed", "stopped")
        assert (document["state"], document["exit_code"], document["error"]["class"]) == ("failed", -9, "killed")
        wait_gone("victim", instance["pid"])
        assert not is_alive(core)
        asker.wait_for_more()
        assert daemon.delete("victim")["status"] == "not_running"
    assert not asker.problems


def test_killed_engine_core(daemon: Daemon, models: Models) -> None:
    """kill -9 of the engine core: vLLM's server ends itself, with code 0, and the instance names the reason."""
    with serving(daemon, models.options("tiny-b"), "heartless") as instance:
        os.kill(engine_core(instance["pid"]), signal.SIGKILL)
        document = daemon.wait_state("heartless", "failed", "stopped")
        assert (document["status"], document["error"]["class"]) == ("stopped", "engine_died")
        wait_gone("heartless", instance["pid"])


def test_delete_with_a_request_in_flight(daemon: Daemon, models: Models) -> None:
    """The stream ends, the tree is gone, and the caller of DELETE is told so."""
    with serving(daemon, long_options(models), "busy") as instance:
        with open_stream(instance, LONG_ANSWER) as lines:
            rest: list[list[str]] = []
            reader = threading.Thread(target=lambda: rest.append(drain(lines)))
            reader.start()
            assert daemon.delete("busy")["status"] == "terminated"
            assert not processes_of("busy", instance["pid"])
            reader.join(30)
        assert rest and not any('"finish_reason":"length"' in line for line in rest[0])
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{instance['url']}/health")


def test_killed_zygote(daemon: Daemon, models: Models, pair: Pair) -> None:
    """kill -9 of the zygote: instances go on, a new one warms by itself, a create waits for it and works."""
    old = daemon.http.get("/ready").json()["zygotes"][0]["pid"]
    with Asker(pair["tiny-a"]) as asker:
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: daemon.http.get("/ready").status_code == 503)
        with serving(daemon, models.options("tiny-a"), "patient") as instance:
            new = daemon.http.get("/ready").json()["zygotes"][0]
            assert new["pid"] != old
            assert instance["start"] in ("spare", "fork")
            assert complete(instance) == asker.answers[0]
        asker.wait_for_more()
    assert not asker.problems
    assert {daemon.instance(name)["pid"] for name in pair} == {instance["pid"] for instance in pair.values()}


def test_killed_daemon(start_real_daemon: Callable[..., Daemon], models: Models, tmp_path: Path) -> None:
    """kill -9 of the daemon: servers answer on under the same pids, the next daemon has them, and can end them."""
    first = start_real_daemon(tmp_path / "s").wait_warm()
    for name in ("one", "two"):
        first.create(models.options("tiny-a"), instance_id=name)
    before = {name: wait_ready(first, name) for name in ("one", "two")}
    log = first.log("one")
    zygote = first.http.get("/ready").json()["zygotes"][0]["pid"]
    with Asker(before["one"]) as one, Asker(before["two"]) as two:
        one.wait_for_more()
        first.kill()
        one.wait_for_more()
        second = start_real_daemon(tmp_path / "s")
        after = {name: second.instance(name) for name in before}
        two.wait_for_more()
    assert not one.problems and not two.problems
    for name, document in before.items():
        assert (after[name]["pid"], after[name]["state"]) == (document["pid"], "ready")
        assert after[name]["url"] == document["url"]
    wait_until(lambda: len(second.log("one")) > len(log))
    assert second.log("one").startswith(log)
    wait_until(lambda: not is_alive(zygote))
    for name, document in before.items():
        assert second.delete(name)["status"] == "terminated"
        assert not processes_of(name, document["pid"])
    assert second.end() == 0


def test_end_of_the_daemon_with_a_stream_open(
    start_real_daemon: Callable[..., Daemon], models: Models, tmp_path: Path
) -> None:
    """SIGTERM with a completion, a watch and a log follow under way: all of it ends, and nobody is left."""
    daemon = start_real_daemon(tmp_path / "state").wait_warm()
    daemon.create(long_options(models), instance_id="busy")
    instance = wait_ready(daemon, "busy")
    shared_memory = [file for pid in processes_of("busy", instance["pid"]) for file in shared_memory_of(pid)]
    threads = []
    with (
        open_stream(instance, LONG_ANSWER) as completion,
        daemon.http.stream("GET", "/v2/vllm/instances/watch") as watch,
        daemon.http.stream("GET", "/v2/vllm/instances/busy/log", params={"follow": True}) as log,
    ):
        for lines in (completion, watch.iter_lines(), log.iter_lines()):
            threads.append(threading.Thread(target=drain, args=(lines,)))
            threads[-1].start()
        assert daemon.end() == 0
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert not processes_of("busy", instance["pid"])
    wait_until(lambda: not users_of(tmp_path / "state"), 5, lambda: str(users_of(tmp_path / "state")))
    assert not [file for file in shared_memory if os.path.exists(file)]
    assert not list((tmp_path / "state" / "logs").glob("*busy*"))


def shared_memory_of(pid: int) -> set[str]:
    """The files in shared memory that a process maps and that have a name."""
    words = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {word[5] for word in words if word[5:] and word[5].startswith("/dev/shm/") and "(deleted)" not in word[5]}


def users_of(folder: Path) -> list[str]:
    """Who has a file below a folder open."""
    found = []
    for pid, line in command_lines().items():
        try:
            targets = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any(target.startswith(f"{folder}/") for target in targets):
            found.append(f"{pid} {line}")
    return found
