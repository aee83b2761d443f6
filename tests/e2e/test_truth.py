"""After every DELETE reply no process of the tree lives, whatever the tree did before."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import processes_of

REPETITIONS = 200
CALLERS = 6


def torment(daemon: Daemon, seed: int) -> str | None:
    """Start an instance that behaves badly, do something to it, delete it; say what is left."""
    dice = random.Random(seed)
    variables: dict[str, Any] = {
        "BULLPEN_SIM_STUBBORN": dice.choice([0, 1, 1, 2]),
        "BULLPEN_SIM_START_SECONDS": dice.choice([0, 0.05, 0.3]),
    }
    if dice.random() < 0.2:
        variables["BULLPEN_SIM_FAIL"] = "start"
    if dice.random() < 0.3:
        variables |= {
            "BULLPEN_SIM_EXIT_AFTER": round(dice.uniform(0, 0.4), 3),
            "BULLPEN_SIM_EXIT_CODE": dice.choice([0, 1, 7]),
        }
    name = f"torment-{seed}"
    pid = daemon.create(instance_id=name, env_vars=variables)["pid"]
    time.sleep(dice.choice([0, 0, dice.uniform(0, 0.5)]))
    harm = dice.choice(["none", "kill server", "kill server", "kill child", "stop server"])
    tree = list(processes_of(name, pid))
    victims = {"kill server": [pid], "kill child": [one for one in tree if one != pid][:1], "stop server": [pid]}
    for victim in victims.get(harm, []):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP if harm == "stop server" else signal.SIGKILL)
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, 0.2))
    reply = daemon.http.delete(f"/v2/vllm/instances/{name}")
    left = processes_of(name, pid)
    if reply.status_code != 200 or left:
        return f"seed {seed} ({variables}, {harm}): {reply.status_code} {reply.text}, left {left}"
    return None


def test_nothing_lives_after_delete(start_daemon: Callable[..., Daemon]) -> None:
    """Stubborn children, crashes, kills while starting, stopped processes: 200 random ones, several at once."""
    daemon = start_daemon(stop_timeout=0.4).wait_warm()
    with ThreadPoolExecutor(CALLERS) as pool:
        complaints = [one for one in pool.map(lambda seed: torment(daemon, seed), range(REPETITIONS)) if one]
    assert not complaints
    listed = daemon.http.get("/v2/vllm/instances").json()
    assert listed["instances"] == []
    assert not list((daemon.state_dir / "logs").glob("[0-9a-f]*.log")), "logs are left"


@pytest.mark.parametrize("stubborn", [0, 1, 2])
def test_a_crashed_server_leaves_no_child(daemon: Daemon, stubborn: int) -> None:
    """SIGKILL of the server: its child goes too, by itself, and the instance says what happened."""
    name = f"crash-{stubborn}"
    pid = daemon.create(instance_id=name, env_vars={"BULLPEN_SIM_STUBBORN": stubborn})["pid"]
    daemon.wait_state(name, "ready")
    assert len(processes_of(name, pid)) >= 2
    os.kill(pid, signal.SIGKILL)
    document = daemon.wait_state(name, "failed")
    assert (document["status"], document["exit_code"], document["error"]["class"]) == ("stopped", -9, "killed")
    wait_until(lambda: not processes_of(name, pid), 5, lambda: str(processes_of(name, pid)))
    assert daemon.delete(name)["status"] == "not_running"


def test_all_are_stopped_side_by_side(start_daemon: Callable[..., Daemon]) -> None:
    """Ten servers that ignore SIGTERM take one stop timeout together, not ten."""
    daemon = start_daemon(stop_timeout=1.5).wait_warm()
    for number in range(10):
        daemon.create(instance_id=f"s{number}", env_vars={"BULLPEN_SIM_STUBBORN": 2})
    for number in range(10):
        daemon.wait_state(f"s{number}", "ready")
    started = time.monotonic()
    reply = daemon.http.delete("/v2/vllm/instances").json()
    assert reply["status"] == "all_stopped"
    assert reply["total_stopped"] == 10
    assert {one["status"] for one in reply["stopped_instances"]} == {"terminated"}
    assert time.monotonic() - started < 10 * 1.5, "they were stopped one after the other"
    assert not [line for number in range(10) for line in processes_of(f"s{number}")]
