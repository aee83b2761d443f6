"""How real servers start: forked whole and warm, refused at once where they never could, explained where they fail."""

from __future__ import annotations

import os
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.real.serving import ENDED, Models, complete, engine_core, serving, wait_gone, wait_ready
from tests.support.daemon import Daemon
from tests.support.processes import command_lines, processes_of, session_of

Pair = dict[str, dict[str, Any]]
START_CODE, START_STACK = 25, 27
"""Fields of ``/proc/PID/stat``, counted from 0: where the program and its stack begin. A fork keeps both; an exec
places both anew, at random."""


def layout(pid: int) -> tuple[int, int]:
    """Where a process's program and stack begin."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[START_CODE - 2]), int(fields[START_STACK - 2])


def zygotes(daemon: Daemon) -> list[dict[str, Any]]:
    """The daemon's zygotes."""
    found: list[dict[str, Any]] = daemon.http.get("/ready").json()["zygotes"]
    return found


def test_every_process_is_forked(daemon: Daemon, models: Models) -> None:
    """Server and engine core go on with the zygote's memory: neither is a program that was started anew."""
    parent = layout(zygotes(daemon)[0]["pid"])
    with serving(daemon, models.options("tiny-a"), "forked") as instance:
        assert instance["start"] in ("spare", "fork")
        tree = processes_of("forked", instance["pid"])
        assert set(tree) == {instance["pid"], engine_core(instance["pid"])}
        assert {layout(pid) for pid in tree} == {parent}
        assert not [line for line in tree.values() if "-c from multiprocessing" in line]
    assert parent != layout(daemon.pid), "a program that was started anew looks different, so this test can fail"


def test_phases_are_told_in_order(pair: Pair) -> None:
    """The reply says when each phase began."""
    for instance in pair.values():
        phases = instance["phases"]
        assert {"start", "configuration", "weights", "kv_cache", "ready"} <= set(phases)
        assert list(phases.values()) == sorted(phases.values())


REFUSED = {
    "unknown flag": ("{model} --no-such-flag 1", "--no-such-flag"),
    "bad number": ("{model} --max-model-len many", "--max-model-len"),
    "bad choice": ("{model} --dtype float7", "--dtype"),
    "bad JSON": ("{model} --compilation-config '{{\"level\": '", "--compilation-config"),
    "no model": ("--max-model-len 128", "--model"),
    "no such folder": ("/nowhere/at/all --max-model-len 128", "/nowhere/at/all"),
    "no server": ("{model} --help", "starts no server"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_before_anything_starts(daemon: Daemon, models: Models, pair: Pair, case: str) -> None:
    """vLLM's own parser says no, in less time than a start takes, and no instance is made."""
    options, expected = REFUSED[case]
    begun = time.monotonic()
    reply = daemon.http.post(
        "/v2/vllm/instances", json={"options": options.format(model=models.folder / "tiny-a") + " --api-key s3cret"}
    )
    seconds = time.monotonic() - begun
    assert reply.status_code == 422
    assert expected in reply.json()["detail"][0]["msg"]
    assert "s3cret" not in reply.text
    assert seconds < min(instance["phases"]["ready"] for instance in pair.values())


FAILING = {
    "architecture": ("{folder}/unknown {tiny}", "unsupported_model", "NobodyKnowsForCausalLM"),
    "length": ("{folder}/tiny-a {tiny} --max-model-len 1000000", "bad_option", "max_model_len"),
    "absent": ("nobody/has-this-model {tiny}", "missing_model", "nobody/has-this-model"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failed_start_says_why_and_keeps_its_log(daemon: Daemon, models: Models, case: str) -> None:
    """What only shows after the fork: ``failed``, a class and one sentence, and the engine's own words in the log."""
    options, kind, word = FAILING[case]
    pid = daemon.create(options.format(folder=models.folder, tiny=shlex.join(models.tiny)), instance_id=case)["pid"]
    document = daemon.wait_state(case, *ENDED)
    assert (document["state"], document["status"]) == ("failed", "stopped")
    assert document["exit_code"] not in (0, None)
    assert document["error"]["class"] == kind
    assert "\n" not in document["error"]["message"]
    assert word in daemon.log(case)
    wait_gone(case, pid)
    assert daemon.delete(case)["status"] == "not_running"


def test_import_time_variable_gets_a_zygote_of_its_own(daemon: Daemon, models: Models, pair: Pair) -> None:
    """A variable that vLLM reads once, at import, takes effect, and the others do not notice."""
    variables = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    with serving(daemon, models.options("tiny-b"), "talkative", env_vars=variables) as instance:
        extra = [one for one in zygotes(daemon) if one["environment"] == ["VLLM_LOGGING_LEVEL"]]
        assert len(extra) == 1
        assert layout(instance["pid"]) == layout(extra[0]["pid"])
        assert complete(instance) == complete(pair["tiny-b"])
        assert " DEBUG " in daemon.log("talkative")
    assert " DEBUG " not in daemon.log("tiny-b")


def test_start_without_a_model_info_cache(daemon: Daemon, models: Models, tmp_path: Path) -> None:
    """Where vLLM's cache knows nothing of a model's class it looks at the class, in a fork and not in a new program."""
    seen: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.extend(line for line in command_lines().values() if "models.registry" in line)
            time.sleep(0.02)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with serving(
            daemon, models.options("tiny-a"), "fresh", env_vars={"VLLM_CACHE_ROOT": str(tmp_path)}
        ) as instance:
            assert complete(instance)
    finally:
        stop.set()
        looking.join()
    assert list((tmp_path / "modelinfos").iterdir())
    assert not seen


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_delete_while_it_loads(daemon: Daemon, models: Models, pair: Pair, share: float) -> None:
    """A start can be called off at any point; when the reply comes nothing of it is left."""
    begun = time.monotonic()
    pid = daemon.create(models.options("tiny-a"), instance_id="called-off")["pid"]
    usual = min(instance["phases"]["ready"] for instance in pair.values())
    time.sleep(max(0.0, share * usual - (time.monotonic() - begun)))
    assert daemon.delete("called-off")["status"] == "terminated"
    assert not processes_of("called-off", pid)


def test_relative_paths_are_the_daemons(daemon: Daemon, models: Models) -> None:
    """A server runs in the folder in which the daemon was started, as it would by hand."""
    daemon.create(models.options("tiny-a"), instance_id="placed")
    pid = wait_ready(daemon, "placed")["pid"]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path(f"/proc/{daemon.pid}/cwd").readlink()
    assert session_of(pid) == pid != os.getsid(daemon.pid)
    daemon.delete("placed")
    assert not processes_of("placed", pid)
