"""``grpc``: what is left of an engine's throughput through gRPC, and what it gains over one request at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench import servers
from bench.common import BenchError, Goal, Options, Progress, Result, Table, median, number
from bench.load import Client, Done, Job
from bench.lock_step import Job as LockStepJob
from bench.lock_step import Round

TITLE = "gRPC"
METHOD = """\
- **Throughput**: {callers} callers ask for completions, each again as soon as it is answered: straight from a simulated
  engine's HTTP port, and by the gRPC method `Complete` through the daemon that runs the engine. All ways in turn, for
  {seconds} s each, rounds: {rounds}, every second one in the opposite order; a ratio is that of each round. The engine
  writes {rate} tokens a second in each completion, so that short ones ask the most of everything around it. The
  callers of one way are one process, and share the machine's cores with daemon and engine.
    - *Minimal callers* (`bench/minimal_callers.py`) are no client that anybody would use. They make each request once,
      send its bytes and look for the end of answers only, which costs about the same by gRPC and by HTTP. Their ratio
      shows what the server side can do: how much the daemon takes away between a caller and the engine.
    - *grpc.aio, aiohttp and httpx* (`bench/python_callers.py`) are what a Python program uses, on asyncio's own loop:
      each request is made, each answer is read; all callers share one channel or one session as it comes. Their ratio
      shows what a Python program gets. It compares the clients as much as the servers: that gRPC is ahead of a slow
      HTTP client is no merit of the daemon.
    - The table of processor times says what limits a way. Where *cores in use* comes near the number of cores, the
      machine is full, and the way that computes least on a call, client and servers together, is ahead. Each process
      runs Python on one core at a time: calls that cost its callers 1,000 µs are at most 1,000 a second, whatever the
      servers could do. Where neither limits, callers wait for the engine's tokens, and both ways come out alike.
- **Lock-step**: {together} callers of `Complete` with real vLLM on the CPU, all on one channel, each asking
  for {lock_step_tokens} tokens again and again; in turn with the same calls under one lock, which is a launch that
  answers one request at a time."""

CALLERS = 64
LENGTHS = (16, 32, 64, 128)
"""In tokens. 16 is what a request gets that does not say."""
RATE = 1000
SHARE_LIMIT = 0.8
PAIRS = (
    (Client.MINIMAL_GRPC, Client.MINIMAL_HTTP),
    (Client.GRPC_AIO, Client.AIOHTTP),
    (Client.GRPC_AIO, Client.HTTPX),
)
"""Callers through gRPC, and those straight to the engine that they are compared with."""

TOGETHER = 8
LOCK_STEP_TOKENS = 64
LOCK_STEP_LIMIT = 5.0


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    rounds, seconds, lock_step = (1, 0.6, (2, 4)) if options.quick else (5, 1.0, (7, 4))
    progress.expect(3 + rounds)
    result = Result(
        TITLE,
        METHOD.format(
            callers=CALLERS,
            rounds=rounds,
            seconds=f"{seconds:g}",
            rate=RATE,
            together=TOGETHER,
            lock_step_tokens=LOCK_STEP_TOKENS,
        ),
    )
    measure_throughput(options, progress, rounds, seconds, LENGTHS, result)
    progress.step("the models")
    measure_lock_step(options, progress, *lock_step, Served.vllm(options), result)
    return result


# -- throughput --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One way in one round: calls a second, and the processor time of a call in each process, in seconds."""

    rate: float
    callers: float
    daemon: float
    engine: float

    @property
    def cores(self) -> float:
        """How many cores they keep busy, all together."""
        return self.rate * (self.callers + self.daemon + self.engine)


@dataclass(frozen=True)
class Turn:
    """All ways in one round, with completions of so many tokens."""

    tokens: int
    parts: dict[Client, Part]

    def share(self, through: Client, straight: Client) -> float:
        """What is left through gRPC."""
        return self.parts[through].rate / self.parts[straight].rate


class Field:
    """A daemon with a simulated engine, and the ports of both."""

    def __init__(self, daemon: servers.Daemon, options: str = "--model m") -> None:
        self.instance_id = str(daemon.create(options)["instance_id"])
        document = daemon.wait_ready(self.instance_id)
        self.grpc_port = daemon.grpc_port
        self.http_port = int(document["url"].rpartition(":")[2])
        self._daemon = psutil.Process(daemon.pid)
        self._engine = servers.tree(document["pid"])

    def measure(self, client: Client, tokens: int, seconds: float) -> Part:
        """Let callers call in one way."""
        port, name = (self.grpc_port, self.instance_id) if client.through else (self.http_port, "m")
        job = Job(client, port, name, tokens, CALLERS, seconds)
        daemon, engine = computed(self._daemon), sum(map(computed, self._engine))
        done = Done(**ask("bench.callers", asdict(job), seconds))
        daemon, engine = computed(self._daemon) - daemon, sum(map(computed, self._engine)) - engine
        check(tokens, done.tokens)
        every = done.warming + done.calls
        return Part(done.calls / done.seconds, done.cpu_seconds / done.calls, daemon / every, engine / every)


def ask(module: str, job: dict[str, Any], seconds: float) -> Any:
    """Let a module do a job as a process of its own, which takes about so long.

    Raises:
        BenchError: it did not.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=servers.ROOT,
            check=False,
            timeout=seconds + servers.END_SECONDS,
        )
    except subprocess.TimeoutExpired as problem:
        raise BenchError(f"{module} does not end") from problem
    if done.returncode != 0:
        raise BenchError(f"{module} failed:\n{done.stderr[-1000:]}")
    return json.loads(done.stdout)


def computed(process: psutil.Process) -> float:
    """The processor time of a process so far, in seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def check(wanted: int, found: int) -> None:
    """Raise BenchError where a completion is of another length than was asked for."""
    if wanted != found:
        raise BenchError(f"asked for {wanted} tokens, the engine wrote {found}")


def measure_throughput(
    options: Options, progress: Progress, rounds: int, seconds: float, lengths: tuple[int, ...], result: Result
) -> None:
    """All ways in turn, at each length."""
    variables = {"BULLPEN_SIM_TOKENS_PER_SECOND": str(RATE)}
    turns = []
    progress.step("a daemon with a simulated engine")
    with servers.Daemon(options, "sim", variables=variables) as daemon:
        daemon.wait_warm()
        daemon.wait_grpc()
        field = Field(daemon)
        for turn in range(rounds):
            progress.step(f"throughput, round {turn + 1} of {rounds}")
            clients = list(Client)[:: -1 if turn % 2 else 1]
            for tokens in lengths:
                turns.append(Turn(tokens, {client: field.measure(client, tokens, seconds) for client in clients}))
    report_throughput(turns, result)


def report_throughput(turns: list[Turn], result: Result) -> None:
    """The tables, and what was to be reached."""
    by_length = {tokens: [turn for turn in turns if turn.tokens == tokens] for tokens in lengths_of(turns)}
    rows = []
    for through, straight in PAIRS:
        shares = {tokens: [turn.share(through, straight) for turn in group] for tokens, group in by_length.items()}
        rows += [
            [
                f"{through}, {straight}",
                str(tokens),
                str(len(group)),
                rate(group, straight),
                rate(group, through),
                figures(shares[tokens]),
                "yes" if median(shares[tokens]) >= SHARE_LIMIT else "**no**",
            ]
            for tokens, group in by_length.items()
        ]
        result.goals.append(share_goal(through, straight, {tokens: median(found) for tokens, found in shares.items()}))
    columns = [
        "callers through gRPC, straight",
        "tokens",
        "rounds",
        "calls a second, straight",
        "through gRPC",
        "ratio (min to max)",
        f"≥ {SHARE_LIMIT}",
    ]
    result.tables.append(Table(f"Throughput of {CALLERS} callers", columns, rows))
    result.tables.append(cost_table(by_length))
    result.data["throughput"] = [asdict(turn) for turn in turns]


def share_goal(through: Client, straight: Client, shares: dict[int, float]) -> Goal:
    """What was to be reached at every length by a pair of callers; and at which it was, where that is not all."""
    worst = min(shares, key=lambda tokens: shares[tokens])
    enough = [str(tokens) for tokens, share in shares.items() if share >= SHARE_LIMIT]
    measured = f"{shares[worst]:.2f}"
    if len(enough) < len(shares):
        measured += f"; reached at {', '.join(enough)} tokens" if enough else "; reached at no length"
    what = f"Calls by {through} through the daemon, to {straight} straight to the engine, at worst ({worst} tokens)"
    return Goal(what, f"≥ {SHARE_LIMIT}", measured, shares[worst] >= SHARE_LIMIT)


def cost_table(by_length: dict[int, list[Turn]]) -> Table:
    """What a call costs each process, and where the callers' own cost is the largest part of it."""
    rows: list[list[str]] = []
    dearest: dict[Client, list[str]] = {}
    for tokens, group in by_length.items():
        for client in Client:
            parts = [turn.parts[client] for turn in group]
            costs = [median([getattr(part, process) for part in parts]) for process in PROCESSES]
            cores = median([part.cores for part in parts])
            rows.append([f"{tokens}: {client}", *map(microseconds, costs), f"{cores:.1f}"])
            if costs[0] > sum(costs[1:]):
                dearest.setdefault(client, []).append(str(tokens))
    found = "; ".join(f"{client} (at {', '.join(tokens)} tokens)" for client, tokens in dearest.items())
    note = f"Clients that compute longer on a call than daemon and engine together: {found or 'none'}."
    return Table("Processor time of a call", ["tokens: callers by", *PROCESSES, "cores in use"], rows, note)


PROCESSES = ("callers", "daemon", "engine")


def lengths_of(turns: list[Turn]) -> list[int]:
    """The lengths that were measured, in tokens."""
    return sorted({turn.tokens for turn in turns})


def rate(turns: list[Turn], client: Client) -> str:
    """The median of calls a second."""
    return number(median([turn.parts[client].rate for turn in turns]))


def figures(values: Sequence[float]) -> str:
    """Median, smallest and largest of ratios."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def microseconds(seconds: float) -> str:
    """A time in microseconds."""
    return f"{seconds * 1e6:.0f} µs"


# -- lock-step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """An engine, and the options of an instance of it."""

    engine: str
    arguments: str

    @classmethod
    def vllm(cls, options: Options) -> Served:
        """Real vLLM with a tiny model."""
        model = next(iter(servers.make_models(options).values()))
        return cls("vllm", " ".join(servers.vllm_arguments(model, 0)))

    @classmethod
    def sim(cls) -> Served:
        """The simulator in its place, to try the course of this benchmark."""
        return cls("sim", "--model m")


def measure_lock_step(
    options: Options, progress: Progress, rounds: int, calls: int, served: Served, result: Result
) -> None:
    """Callers at the same time, in turn with one request at a time; `calls` is of each caller in a round."""
    progress.step("Bullpen imports the engine")
    with servers.Daemon(options, served.engine) as daemon:
        daemon.wait_warm()
        daemon.wait_grpc()
        instance_id = str(daemon.create(served.arguments)["instance_id"])
        daemon.wait_ready(instance_id, servers.START_SECONDS)
        progress.step(f"{TOGETHER} callers, together and in lock-step")
        job = LockStepJob(f"{servers.HOST}:{daemon.grpc_port}", instance_id, TOGETHER, LOCK_STEP_TOKENS, calls, rounds)
        found = ask("bench.lock_step", asdict(job), servers.START_SECONDS)
    report_lock_step([Round(**one) for one in found], result)


def report_lock_step(rounds: list[Round], result: Result) -> None:
    """The table, and what was to be reached."""
    gains = [one.together / one.lock_step for one in rounds]
    rows = [
        ["one request at a time", str(len(rounds)), number(median([one.lock_step for one in rounds])), "1"],
        [
            "**all at the same time**",
            str(len(rounds)),
            number(median([one.together for one in rounds])),
            figures(gains),
        ],
    ]
    same = all(one.same for one in rounds)
    note = "Both gave the same completions." if same else "**The completions differ.**"
    columns = ["", "rounds", "calls a second", "to lock-step (min to max)"]
    result.tables.append(Table(f"{TOGETHER} callers of real vLLM on the CPU", columns, rows, note))
    gain = median(gains)
    what = f"{TOGETHER} callers of one launch, to one request at a time"
    result.goals.append(Goal(what, f"≥ {LOCK_STEP_LIMIT:g} times", f"{gain:.2f} times", gain >= LOCK_STEP_LIMIT))
    result.data["lock_step"] = [asdict(one) for one in rounds]
