"""504 random swaps that go wrong in every way there is; after each round the book is equal to reality.

Eight lanes, one mock GPU each, swap side by side. In each run something fails at a random step: the engine of what goes
or comes does not sleep, wake or start, hangs or dies; a process is killed; another caller deletes, wakes or puts to
sleep what is being swapped, or swaps it back; the caller hangs up. In some rounds the daemon is killed in the middle.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.truth import Document, both_awake, call, compare, held, says, trees

ROUNDS, LANES = 63, 8
SEED = "BULLPEN_TEST_SEED"
"""The variable that repeats the dice of a run that failed."""
AWAKE_MIB, ASLEEP_MIB = 1000, 64
HOST = "127.84.82.85"
"""Loopback as well, and nobody else's: a port that is still taken there is one of these servers'."""
SETTINGS = {
    "instance_host": HOST,
    "mock_gpus": 1,
    "mock_gpu_count": LANES,
    "mock_gpu_memory": 1500,  # MiB: room for one that is awake and a few sleepers
    "sleep_timeout": 0.5,
    "wake_timeout": 0.5,
    "memory_timeout": 0.5,
    "turn_timeout": 3,
    "start_timeout": 10,
    "drain": 0.3,
    "stop_timeout": 0.5,
}
KEPT = 4
"""How many instances a lane keeps from one round to the next."""
ANSWER_SECONDS = 30.0
SETTLE_SECONDS = 15.0
WORDS = ("sleep", "sleep_hang", "sleep_exit", "wake", "wake_hang", "wake_exit", "answer", "start", "request")
HARMS = ("none",) * 6 + (
    "kill the server of out",
    "kill the child of out",
    "kill the server of in",
    "kill the child of in",
    "delete out",
    "delete in",
    "wake out",
    "wake in",
    "sleep in",
    "sleep out",
    "swap back",
    "hang up",
)
INSTANCES = "/v2/vllm/instances"


@dataclass
class World:
    """What all lanes share.

    Attributes:
        daemon: the current one.
        folder: for the files that tell simulators to fail.
        killed: whether the daemon is being killed in this round, so that calls may stay without an answer.
        seen: how often each outcome was seen.
    """

    daemon: Daemon
    folder: Path
    killed: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, body: object = None, seconds: float = ANSWER_SECONDS) -> tuple[int, Any]:
        """Call the daemon; status 0 where no answer came."""
        try:
            return call(self.daemon.url + path, method, body, seconds)
        except (OSError, http.client.HTTPException) as problem:
            return 0, f"{type(problem).__name__}: {problem}"

    def documents(self, prefix: str = "") -> list[Document]:
        """The instances whose ids begin so."""
        status, listed = self.ask("GET", INSTANCES)
        assert status == 200, listed
        return [one for one in listed["instances"] if one["instance_id"].startswith(prefix)]


@dataclass
class Run:
    """One swap and what is done to it."""

    incoming: str
    outgoing: str
    body: Document
    fails: dict[str, str]
    harm: str
    harm_after: float
    mend_after: float | None
    traffic: str | None

    def __str__(self) -> str:
        """The story, in short."""
        asked = {**self.body, "in": self.incoming, "new": isinstance(self.body["in"], dict)}
        after = f"{self.harm_after:.3f}" if self.harm != "none" else "-"
        busy = "awake" if self.traffic is None else "busy"
        return f"{asked}, {self.outgoing} {busy}; fails {self.fails}, mended {self.mend_after}; {self.harm} ({after})"

    @property
    def calm(self) -> bool:
        """Whether nobody else meddles, so that the swap's answer is the last word."""
        return self.harm == "none"


class Lane:
    """One GPU and the instances that take turns on it."""

    def __init__(self, number: int, world: World) -> None:
        self.number = number
        self.world = world
        self._count = 0

    def documents(self) -> list[Document]:
        """The lane's instances."""
        return self.world.documents(f"lane{self.number}-")

    def _complain(self, text: str) -> None:
        self.world.complaints.append(f"lane {self.number}: {text}")

    def _fail_file(self, name: str) -> Path:
        return self.world.folder / name

    def _new(self, dice: random.Random) -> Document:
        """A configuration that was not there before."""
        self._count += 1
        name = f"lane{self.number}-{self._count}"
        config: Document = {
            "instance_id": name,
            "options": f"--model {name}",
            "gpu_uuids": [str(self.number)],
            "env_vars": {
                "BULLPEN_SIM_AWAKE_MIB": str(AWAKE_MIB),
                "BULLPEN_SIM_ASLEEP_MIB": str(ASLEEP_MIB),
                "BULLPEN_SIM_FAIL_FILE": str(self._fail_file(name)),
                "BULLPEN_SIM_SLEEP_SECONDS": f"{dice.choice([0, 0.02, 0.1])}",
                "BULLPEN_SIM_WAKE_SECONDS": f"{dice.choice([0, 0.02, 0.1])}",
                "BULLPEN_SIM_TOKENS_PER_SECOND": "100",
                "BULLPEN_SIM_STUBBORN": f"{dice.choice([0, 0, 0, 1, 2])}",
            },
        }
        if dice.random() < 0.25:
            config["sleep"] = "emulate"
        if dice.random() < 0.2:
            question = {"model": name, "prompt": "warm", "max_tokens": 2}
            config["warm_up"] = {"path": "/v1/completions", "body": question}
        return config

    # -- before a run ------------------------------------------------------------------------------------------

    def prepare(self, dice: random.Random) -> None:
        """Have one instance ready and some that are not; with nothing failing, that must work."""
        here = self.documents()
        for one in here:
            self._fail_file(one["instance_id"]).unlink(missing_ok=True)
        awake = [one for one in here if one["state"] == "ready"]
        rest = [one for one in here if one["state"] != "ready"]
        if not awake:
            self._wake_one(dice, rest)
        dice.shuffle(rest)
        for one in rest[KEPT - 1 :]:
            status, answer = self.world.ask("DELETE", f"{INSTANCES}/{one['instance_id']}")
            if status != 200:
                self._complain(f"{one['instance_id']} cannot be deleted: {status} {answer}")
        for one in rest[: KEPT - 1]:
            if "sleep_level" in one and dice.random() < 0.15:
                heeds = one["env_vars"]["BULLPEN_SIM_STUBBORN"] != "2"
                self._end(one, dice.choice([signal.SIGTERM, signal.SIGKILL]) if heeds else signal.SIGKILL)

    def _wake_one(self, dice: random.Random, rest: list[Document]) -> None:
        if not rest:
            config = self._new(dice)
            status, answer = self.world.ask("PUT", f"{INSTANCES}/{config.pop('instance_id')}", config)
            if status != 201:
                self._complain(f"nothing can be created: {status} {answer}")
            wait_until(lambda: all(one["state"] == "ready" for one in self.documents()))
            return
        chosen = rest.pop(dice.randrange(len(rest)))
        status, answer = self.world.ask("POST", f"{INSTANCES}/{chosen['instance_id']}/wake")
        if status != 200 or answer["state"] != "ready":
            self._complain(f"{chosen} cannot be woken although nothing fails: {status} {answer}")

    def _end(self, document: Document, number: signal.Signals) -> None:
        """Let a server end by itself."""
        if self._signal(document["pid"], number):
            name = document["instance_id"]
            wait_until(lambda: self.world.ask("GET", f"{INSTANCES}/{name}")[1]["state"] in ("stopped", "failed"))

    def _signal(self, pid: int | None, number: signal.Signals = signal.SIGKILL, *, child: bool = False) -> bool:
        """Signal a server, or its child; only a process whose output is a log of this daemon's instances."""
        of_tree = next((pids for pids in trees(self.world.daemon.state_dir).values() if pid in pids), set())
        victims = of_tree - {pid} if child else of_tree & {pid}
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, number)
        return bool(victims)

    # -- a run -------------------------------------------------------------------------------------------------

    def plan(self, dice: random.Random) -> Run | None:
        """Choose who comes and goes, and what goes wrong."""
        here = self.documents()
        awake = [one["instance_id"] for one in here if one["state"] == "ready"]
        rest = [one["instance_id"] for one in here if one["state"] != "ready"]
        url = next((one["url"] for one in here if one["state"] == "ready"), None)
        if len(awake) != 1:
            self._complain(f"{awake} are ready, before a round")
            return None
        new = None if rest and dice.random() < 0.75 else self._new(dice)
        incoming = new["instance_id"] if new else dice.choice(rest)
        others = [one for one in rest if one != incoming][:1]
        out: Any = dice.choice([awake, awake, "auto", awake + others])
        body: Document = {"in": new or incoming, "out": out, "new_requests": dice.choice(["hold", "refuse"])}
        if dice.random() < 0.7:
            body["sleep_level"] = dice.choice([1, 2])
        fails = {name: dice.choice(WORDS) for name in (incoming, awake[0]) if dice.random() < 0.4}
        for name, word in fails.items():
            self._fail_file(name).write_text(word)
        mend = dice.uniform(0, 0.5) if dice.random() < 0.3 else None
        busy = url if dice.random() < 0.3 else None
        return Run(incoming, awake[0], body, fails, dice.choice(HARMS), dice.uniform(0, 0.25), mend, busy)

    def run(self, run: Run) -> None:
        """Swap, and do harm meanwhile; complain where what comes of it is not true."""
        work = (self._do_harm, self._mend, self._keep_busy)
        helpers = [threading.Thread(target=one, args=(run,)) for one in work]
        for helper in helpers:
            helper.start()
        hangs_up = run.harm == "hang up"
        status, answer = self.world.ask(
            "POST", "/v2/vllm/swap", run.body, run.harm_after if hangs_up else ANSWER_SECONDS
        )
        if status == 200:
            self._check_success(run, answer)
        elif status in (404, 409, 500):
            self._check_failure(run, status, answer)
        elif status or not (hangs_up or self.world.killed):
            self._complain(f"{run}: {status} {answer}")
        self.world.seen[f"{status}"] += 1
        for helper in helpers:
            helper.join()

    def _check_success(self, run: Run, answer: Document) -> None:
        states = {one["instance_id"]: one["state"] for one in answer["out"]}
        if answer["in"]["state"] != "ready" or (run.calm and set(states.values()) - {"sleeping"}):
            self._complain(f"{run}: answered well, with {answer['in']['state']} and {states}")
        if not run.calm or self.world.killed:
            return
        if says(answer["in"]) != (False, "open"):
            self._complain(f"{run}: answered well, and what came in says {says(answer['in'])}")
        for one in answer["out"]:
            if "sleep_level" in one and says(one)[0] is not True:
                self._complain(f"{run}: answered well, and {one['instance_id']} says {says(one)}")

    def _check_failure(self, run: Run, status: int, answer: Document) -> None:
        words = answer.get("detail")
        if not isinstance(words, str) or len(words) < 20:
            self._complain(f"{run}: {status} without a reason: {answer}")
        if not run.calm or self.world.killed or run.fails.get(run.outgoing) == "start":
            return  # who meddles may have had the last word; and what cannot start cannot come back
        state = self.world.ask("GET", f"{INSTANCES}/{run.outgoing}")[1].get("state")
        if state != "ready" and not self.world.killed:
            self._complain(f"{run}: {status} {words}, and {run.outgoing} is {state}")

    def check_end(self, run: Run) -> None:
        """Where nobody meddled, one of both is ready when all is over, even if the daemon was killed meanwhile."""
        if run.harm not in ("none", "hang up") or run.fails.get(run.outgoing) == "start":
            return
        states = {one["instance_id"]: one["state"] for one in self.documents()}
        if [states.get(run.incoming), states.get(run.outgoing)].count("ready") != 1:
            self._complain(f"{run}: now the lane is {states}")

    def _keep_busy(self, run: Run) -> None:
        """Have a request in flight that a drain may have to cut off, or that is held; its answer is no matter here."""
        if run.traffic is not None:
            question = {"model": run.outgoing, "prompt": "hello", "max_tokens": 40}
            with suppress(OSError, http.client.HTTPException):
                call(f"{run.traffic}/v1/completions", "POST", question, seconds=0.5)

    def _mend(self, run: Run) -> None:
        """Let failures go away on the way."""
        if run.mend_after is not None:
            time.sleep(run.mend_after)
            for name in run.fails:
                self._fail_file(name).unlink(missing_ok=True)

    def _do_harm(self, run: Run) -> None:
        if run.harm in ("none", "hang up"):
            return
        time.sleep(run.harm_after)
        verb, _, rest = run.harm.partition(" ")
        name = run.outgoing if rest.endswith("out") else run.incoming
        path = f"{INSTANCES}/{name}"
        if verb == "kill":
            document = self.world.ask("GET", path)[1]
            if isinstance(document, dict):
                self._signal(document.get("pid"), child="child" in rest)
            return
        if verb == "delete":
            status, answer = self.world.ask("DELETE", path)
        elif verb == "swap":
            status, answer = self.world.ask("POST", "/v2/vllm/swap", {"in": run.outgoing, "out": "auto"})
        else:
            status, answer = self.world.ask("POST", f"{path}/{verb}")
        if status not in (200, 404, 409, 500) and not self.world.killed:
            self._complain(f"{run}: {run.harm} was answered with {status} {answer}")


# -- rounds -----------------------------------------------------------------------------------------------------------


def watch(world: World, over: threading.Event) -> None:
    """At every moment at most one server is awake on each GPU."""
    while not over.wait(0.02):
        world.complaints.extend(both_awake(world.daemon.state_dir, ASLEEP_MIB))


def kill_and_start(world: World, after: float, start: Callable[[], Daemon]) -> None:
    """The daemon's crash."""
    time.sleep(after)
    world.daemon.kill()
    world.daemon = start()


def one_round(
    world: World, lanes: list[Lane], pool: ThreadPoolExecutor, dice: random.Random, start: Callable[[], Daemon]
) -> None:
    """Let all lanes swap side by side, wait until nothing is under way, and compare."""
    seeds = [dice.getrandbits(32) for _ in lanes]
    crash = dice.uniform(0.01, 0.7) if dice.random() < 0.2 else None
    world.killed = False
    throws = [random.Random(seed) for seed in seeds]
    list(pool.map(Lane.prepare, lanes, throws))
    runs = list(pool.map(Lane.plan, lanes, throws))
    world.killed = crash is not None
    running = [pool.submit(lane.run, run) for lane, run in zip(lanes, runs, strict=True) if run is not None]
    if crash is not None:
        kill_and_start(world, crash, start)
    for one in running:
        one.result()
    deadline = time.monotonic() + SETTLE_SECONDS
    while wrong := compare(world.daemon.url, world.daemon.state_dir, AWAKE_MIB, ASLEEP_MIB):
        if time.monotonic() > deadline:
            world.complaints += wrong
            break
        time.sleep(0.05)
    for lane, run in zip(lanes, runs, strict=True):
        if run is not None:
            lane.check_end(run)
    if world.complaints:
        crashed = "no crash" if crash is None else f"the daemon killed after {crash:.3f} s"
        world.complaints += [f"after: {crashed}", *map(str, runs)]


def nothing_is_left(state_dir: Path, ports: set[int]) -> None:
    """No process, no memory, no file, no port."""
    assert trees(state_dir) == {}
    assert not any(held(state_dir).values())
    assert not list((state_dir / "logs").glob("[0-9a-f]*.log"))
    assert [path.name for path in (state_dir / "run").glob("*") if path.is_dir()] == []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_book_is_true_whatever_fails(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """504 runs; the seed of a run that failed is in its message."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().getrandbits(32))
    state_dir = tmp_path / "state"

    def start() -> Daemon:
        return start_daemon(state_dir, **SETTINGS)

    world = World(start().wait_warm(), tmp_path)
    lanes = [Lane(number, world) for number in range(LANES)]
    over, ports = threading.Event(), set()
    watcher = threading.Thread(target=watch, args=(world, over))
    watcher.start()
    outputs = []
    try:
        with ThreadPoolExecutor(LANES) as pool:
            for number in range(ROUNDS):
                before = world.daemon
                one_round(world, lanes, pool, random.Random(f"{seed}-{number}"), start)
                ports |= {urlsplit(one["url"]).port for one in world.documents() if one["url"]}
                outputs += before.output if before is not world.daemon else []
                found = "\n".join([f"{SEED}={seed}, round {number}:", *world.complaints])
                assert not world.complaints, found
    finally:
        over.set()
        watcher.join()
    status, answer = world.ask("DELETE", INSTANCES)
    assert (status, answer["status"]) == (200, "all_stopped"), answer
    nothing_is_left(state_dir, {port for port in ports if port is not None})
    world.daemon.end()
    said = [line for line in [*outputs, *world.daemon.output] if "bug in Bullpen" in line or "Traceback" in line]
    assert not said, f"{SEED}={seed}: {said}"
    assert world.seen["200"] > ROUNDS, world.seen
    assert world.seen["409"] + world.seen["500"] > ROUNDS, world.seen
