"""Whatever happens to launches, what is said of them is so: states, GPUs, processes, records and logs."""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest

from tests.e2e.launches.calls import (
    ENDED,
    WORDS,
    Document,
    launch,
    loading,
    log_of,
    reach,
    settle,
    status,
    stop,
)
from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive, processes_of
from tests.support.truth import call, trees

PAIRS = 40
CALLERS = 6
GPUS = 4
KEPT = 100
STORMS, MOST = 3, 8
WANTED = (None, [0], [1], [2], [3], [0, 1], [2, 3], [1, 2])
HARMS = ("stop at once", "stop while it loads", "none", "none", "kill", "kill, see it", "kill child", "freeze")
CONFLICT = re.compile(r"gpu (\d+) -> ([0-9a-f-]{36})")
SETTINGS: dict[str, Any] = {"mock_gpus": True, "mock_gpu_count": GPUS}


@dataclass
class Turn:
    """One launch: when it was asked for, when it was there, when its end began, when it was over."""

    launch_id: str
    gpu_ids: list[int]
    asked: float
    granted: float
    end_began: float = 0.0
    over: float = 0.0
    was_ready: bool = False


@dataclass
class Refusal:
    """One 409: when it was asked for, when it came, and whom it names for which GPU."""

    asked: float
    came: float
    gpu_ids: list[int]
    named: list[tuple[int, str]]


@dataclass
class Storm:
    """Launches and stops by several callers at once, which share the GPUs of one daemon."""

    daemon: Daemon
    turns: list[Turn] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def pair(self, dice: random.Random) -> None:
        """Launch, as soon as its GPUs are free; do something to it; stop it."""
        turn = self.begin(dice)
        name = turn.launch_id
        harm = dice.choice(HARMS)
        document = status(self.daemon, name)
        if harm != "stop at once":
            document = loading(self.daemon, name)
        if harm not in ("stop at once", "stop while it loads") and dice.random() < 0.7:
            document = reach(self.daemon, name, "ready")
            turn.was_ready = True
        seen = ENDED if harm.startswith("kill") else ("stopped",)
        turn.end_began = time.monotonic()
        do_harm(harm, document)
        if harm == "kill, see it":
            failed = reach(self.daemon, name, "failed")
            assert failed["error"], failed
            seen = ("failed",)
        ended = stop(self.daemon, name)
        turn.over = time.monotonic()
        assert ended["state"] in seen, (harm, ended)
        assert ended["state"] == "failed" or ended["error"] is None, (harm, ended)
        left = processes_of(name, document["pid"])
        assert not left, (harm, left)
        assert stop(self.daemon, name) == status(self.daemon, name) == ended, "a second stop changes nothing"

    def begin(self, dice: random.Random) -> Turn:
        """Launch; wait where others have the GPUs."""
        wanted = dice.choice(WANTED)
        body = {"model": "m", **({} if wanted is None else {"gpu_ids": wanted})}
        gpu_ids = list(range(GPUS)) if wanted is None else wanted
        deadline = time.monotonic() + 60
        while True:
            asked = time.monotonic()
            code, document = call(f"{self.daemon.url}/launch", "POST", body)
            came = time.monotonic()
            if code == 201:
                assert (document["state"], document["gpu_ids"]) == ("bootstrapping", gpu_ids)
                turn = Turn(document["launch_id"], gpu_ids, asked, came)
                self.turns.append(turn)
                return turn
            assert code == 409, document
            named = [(int(gpu), name) for gpu, name in CONFLICT.findall(document["detail"])]
            self.refusals.append(Refusal(asked, came, gpu_ids, named))
            assert came < deadline, "its GPUs are never free"
            time.sleep(dice.uniform(0.0, 0.05))

    def check_book(self) -> None:
        """No GPU had two launches at a time, and each refusal names launches that were there at that time."""
        for one, other in combinations(self.turns, 2):
            if set(one.gpu_ids) & set(other.gpu_ids):
                assert one.end_began < other.granted or other.end_began < one.granted, (one, other)
        turns = {turn.launch_id: turn for turn in self.turns}
        for refusal in self.refusals:
            assert refusal.named, refusal
            for gpu, name in refusal.named:
                owner = turns[name]
                assert gpu in refusal.gpu_ids and gpu in owner.gpu_ids, (refusal, owner)
                assert owner.asked < refusal.came and refusal.asked < owner.over, (refusal, owner)


def do_harm(harm: str, document: Document) -> None:
    """Signal a launch's server, or its engine child."""
    pid = document["pid"]
    tree = processes_of(document["launch_id"], pid)
    victims = {"freeze": [pid], "kill": [pid], "kill, see it": [pid], "kill child": [one for one in tree if one != pid]}
    for victim in victims.get(harm, [])[:1]:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP if harm == "freeze" else signal.SIGKILL)


@contextmanager
def watched(daemon: Daemon) -> Iterator[None]:
    """Look at the list of launches all the while: no GPU is in two of them, none goes back in its life."""
    over = threading.Event()
    troubles: list[str] = []
    last: dict[str, str] = {}

    def look() -> None:
        listed = daemon.http.get("/launch").json()
        gpus = [gpu for one in listed for gpu in one["gpu_ids"]]
        if len(set(gpus)) < len(gpus):
            troubles.append(f"a GPU has two: {listed}")
        for one in listed:
            name, state = one["launch_id"], one["state"]
            if state in ENDED or WORDS.index(state) < WORDS.index(last.get(name, WORDS[0])):
                troubles.append(f"{name} was {last.get(name)} and is listed as {state}")
            last[name] = state

    def watch() -> None:
        while not over.wait(0.01):
            try:
                look()
            except Exception as problem:
                troubles.append(repr(problem))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(30)
    assert not troubles
    assert last, "nothing was seen"


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [0, 1])
def test_pairs_in_quick_succession(start_here: Callable[..., Daemon], stubborn: int) -> None:
    """Stops at once and while loading, kills and frozen servers among them; then 100 newer ones take their places."""
    variables = {"BULLPEN_SIM_STUBBORN": str(stubborn), "BULLPEN_SIM_START_SECONDS": "0.15"}
    daemon = start_here(environment=variables, **SETTINGS).wait_warm()
    storm = Storm(daemon)
    with watched(daemon), ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda number: storm.pair(random.Random(f"{stubborn} {number}")), range(PAIRS)))
    storm.check_book()
    assert len(storm.turns) == PAIRS
    assert storm.refusals, "nobody had to wait: nothing was shared"
    settle(daemon)
    assert not trees(daemon.state_dir)

    names = [turn.launch_id for turn in storm.turns]
    logs = set((daemon.state_dir / "logs").glob("[0-9a-f]*.log"))
    assert all(status(daemon, name)["state"] in ENDED for name in names)
    assert all(
        "Application startup complete" in log_of(daemon, turn.launch_id) for turn in storm.turns if turn.was_ready
    )
    assert logs and any(turn.was_ready for turn in storm.turns)
    with ThreadPoolExecutor(GPUS) as pool:
        list(pool.map(lambda gpu: fail_often(daemon, gpu, KEPT // GPUS), range(GPUS)))
    wait_until(lambda: not any(known(daemon, name) for name in names))
    assert not logs & set((daemon.state_dir / "logs").iterdir())
    settle(daemon)
    _, listed = call(f"{daemon.url}/v2/vllm/instances")
    assert len(listed["instances"]) == KEPT


def fail_often(daemon: Daemon, gpu: int, times: int) -> None:
    """Launch and see it fail, one after the other."""
    for _ in range(times):
        name = launch(daemon, gpu_ids=[gpu], extra_kwargs={"port": "none"})["launch_id"]
        reach(daemon, name, "failed")
        stop(daemon, name)


def known(daemon: Daemon, launch_id: str) -> bool:
    """Whether anything is known of a launch; all paths must say the same."""
    paths = (f"status/{launch_id}", f"logs/{launch_id}", f"v2/vllm/instances/{launch_id}")
    codes = {call(f"{daemon.url}/{path}")[0] for path in paths}
    assert codes <= {200, 404}
    return 200 in codes


@pytest.mark.slow
def test_a_crash_of_the_daemon(start_here: Callable[..., Daemon]) -> None:
    """Launches in every state when the daemon is killed: the next one knows each, and lets each come to its end."""
    variables = {"BULLPEN_SIM_STUBBORN": "2", "BULLPEN_SIM_START_SECONDS": "1"}
    settings = {**SETTINGS, "mock_gpu_count": 6, "environment": variables}
    first = start_here(**settings).wait_warm()
    names = {gpu: launch(first, f"org/m{gpu}", gpu_ids=[gpu])["launch_id"] for gpu in range(5)}
    before = {gpu: reach(first, name, "ready") for gpu, name in names.items()}
    os.kill(before[1]["pid"], signal.SIGKILL)
    failed = reach(first, names[1], "failed")
    wait_until(lambda: not processes_of(names[1], before[1]["pid"]))
    os.kill(before[2]["pid"], signal.SIGKILL)
    reach(first, names[2], "failed")
    stopped = stop(first, names[3])
    late = launch(first, "org/late", gpu_ids=[5])["launch_id"]
    stopper = threading.Thread(target=stop_in_vain, args=(first, names[4]))
    stopper.start()
    reach(first, names[4], "stopping")
    loading(first, late)
    first.kill()
    stopper.join(10)
    os.kill(before[0]["pid"], signal.SIGKILL)
    wait_until(lambda: not is_alive(before[0]["pid"]))

    second = start_here(**settings)
    assert status(second, names[3]) == stopped
    assert {**status(second, names[1]), "updated_at": ""} == {**failed, "updated_at": ""}
    assert reach(second, names[0], "failed")["error"], "it ended while nobody looked"
    assert reach(second, names[4], "stopped")["error"] is None
    assert reach(second, late, "ready")["model"] == "org/late"
    for name in names.values():
        assert "simulator" in log_of(second, name)
    settle(second)
    assert [one["launch_id"] for one in call(f"{second.url}/launch")[1]] == [late]
    code, refused = call(f"{second.url}/launch", "POST", {"model": "m"})
    assert (code, refused["detail"]) == (409, f"Requested GPUs are in use (gpu 5 -> {late})")
    assert stop(second, late)["state"] == "stopped"
    settle(second)
    assert launch(second.wait_warm())["gpu_ids"] == list(range(6))


def stop_in_vain(daemon: Daemon, launch_id: str) -> None:
    """Ask for a stop of which the daemon does not live to tell."""
    with suppress(OSError, http.client.HTTPException):
        call(f"{daemon.url}/stop/{launch_id}", "POST")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_crashes_of_the_daemon_in_a_storm(start_here: Callable[..., Daemon], seed: int) -> None:
    """kill -9 at some moment, several times: what a 201 has promised is known, nothing else lives, GPUs come back."""
    dice = random.Random(seed)
    variables = {"BULLPEN_SIM_STUBBORN": str(seed % 3), "BULLPEN_SIM_START_SECONDS": "0.3"}
    promised: set[str] = set()
    for _ in range(STORMS):
        daemon = start_here(environment=variables, **SETTINGS).wait_warm()
        with ThreadPoolExecutor(GPUS) as pool:
            for gpu in range(GPUS):
                pool.submit(come_and_go, daemon, gpu, random.Random(dice.random()), promised)
            time.sleep(dice.uniform(0.2, 1.5))
            daemon.kill()
        after = start_here(environment=variables, **SETTINGS)
        assert all(known(after, name) for name in promised)
        settle(after)
        stop_all(after)
        settle(after)
        assert not trees(after.state_dir)
        everything = launch(after.wait_warm())
        assert everything["gpu_ids"] == list(range(GPUS))
        promised.add(everything["launch_id"])
        after.kill()
    assert len(promised) > 3, "the storms did nothing"
    settle(start_here(environment=variables, **SETTINGS))


def stop_all(daemon: Daemon) -> None:
    """Stop, side by side, the launches that have not ended."""
    _, current = call(f"{daemon.url}/launch")
    with ThreadPoolExecutor(GPUS) as pool:
        ended = list(pool.map(lambda one: stop(daemon, one["launch_id"]), current))
    assert {one["state"] for one in ended} <= {"stopped"}


def come_and_go(daemon: Daemon, gpu: int, dice: random.Random, promised: set[str]) -> None:
    """Launch and stop on one GPU until the daemon is no more; not so often that the first ones would be forgotten."""
    with suppress(OSError, http.client.HTTPException):
        for _ in range(MOST):
            code, document = call(f"{daemon.url}/launch", "POST", {"model": "m", "gpu_ids": [gpu]})
            if code != 201:  # what an earlier storm left has it
                time.sleep(0.05)
                continue
            promised.add(document["launch_id"])
            time.sleep(dice.choice([0, dice.uniform(0, 0.6)]))
            call(f"{daemon.url}/stop/{document['launch_id']}", "POST")
