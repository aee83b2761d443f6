"""``grpc``: what is left of an engine's throughput through gRPC, and what it gains over one request at a time."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench import servers
from bench.callers import Done, Job
from bench.common import BenchError, Goal, Options, Progress, Result, Table, median, number
from bench.lock_step import METHOD as COMPLETE
from bench.lock_step import Job as LockStepJob
from bench.lock_step import Round
from bullpen.proto import bootstrap as pb

TITLE = "gRPC"
METHOD = """\
- **Throughput**: {callers} callers ask for completions, each again as soon as it is answered: straight from a simulated
  engine's HTTP port, and by the gRPC method `Complete` through the daemon that runs the engine. Both in turn, in
  rounds of {seconds} s each, the other one first in every second round; the ratio is that of each round. The engine
  writes {rate} tokens a second in each completion, so that short ones ask the most of everything around it. The
  callers are one process, which makes each request once and looks for the end of answers only, so that both ways cost
  it about the same (`bench/callers.py`); its processor time is in the table. Callers, daemon and engine share the
  machine's cores.
- **Lock-step**: {together} callers of `Complete` with real vLLM on the CPU, all on one channel, each asking
  for {lock_step_tokens} tokens again and again; in turn with the same calls under one lock, which is a launch that
  answers one request at a time."""

CALLERS = 64
LENGTHS = (16, 32, 64, 128)
"""In tokens. 16 is what a request gets that does not say."""
RATE = 1000
SHARE_LIMIT = 0.8
PROMPT = "In a bullpen the next pitcher is"

TOGETHER = 8
LOCK_STEP_TOKENS = 64
LOCK_STEP_LIMIT = 5.0


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    rounds, seconds, lock_step = (2, 1.0, (2, 2)) if options.quick else (8, 2.0, (5, 4))
    progress.expect(3 + rounds)
    result = Result(
        TITLE,
        METHOD.format(
            callers=CALLERS, seconds=f"{seconds:g}", rate=RATE, together=TOGETHER, lock_step_tokens=LOCK_STEP_TOKENS
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


@dataclass(frozen=True)
class Pair:
    """Both ways in one round, with completions of so many tokens."""

    tokens: int
    straight: Part
    through: Part

    @property
    def share(self) -> float:
        """What is left through gRPC."""
        return self.through.rate / self.straight.rate


class Field:
    """A daemon with a simulated engine, and the ports of both."""

    def __init__(self, daemon: servers.Daemon, options: str = "--model m") -> None:
        self.instance_id = str(daemon.create(options)["instance_id"])
        document = daemon.wait_ready(self.instance_id)
        self.grpc_port = daemon.grpc_port
        self.http_port = int(document["url"].rpartition(":")[2])
        self._daemon = psutil.Process(daemon.pid)
        self._engine = servers.tree(document["pid"])

    def straight(self, tokens: int, seconds: float) -> Part:
        """Ask the engine itself."""
        body = json.dumps({"model": "m", "prompt": [PROMPT], "max_tokens": tokens}).encode()
        part, answer = self._measure("http", self.http_port, "/v1/completions", body, seconds)
        check(tokens, json.loads(answer)["usage"]["completion_tokens"])
        return part

    def through(self, tokens: int, seconds: float) -> Part:
        """Ask through the daemon."""
        request = pb.CompleteRequest(launch_id=self.instance_id, prompts=[PROMPT], max_tokens=tokens)
        part, answer = self._measure("grpc", self.grpc_port, COMPLETE, request.SerializeToString(), seconds)
        check(tokens, pb.CompleteResponse.FromString(answer).completions[0].completion_tokens)
        return part

    def _measure(self, protocol: str, port: int, path: str, request: bytes, seconds: float) -> tuple[Part, bytes]:
        """Let the callers call; how it went, and the first answer."""
        job = Job(protocol, port, path, base64.b64encode(request).decode(), CALLERS, seconds)
        daemon, engine = computed(self._daemon), sum(map(computed, self._engine))
        done = Done(**ask("bench.callers", asdict(job), seconds))
        daemon, engine = computed(self._daemon) - daemon, sum(map(computed, self._engine)) - engine
        every = done.warming + done.calls
        part = Part(done.calls / done.seconds, done.cpu_seconds / done.calls, daemon / every, engine / every)
        return part, base64.b64decode(done.first)


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
    """Both ways in turn, at each length."""
    variables = {"BULLPEN_SIM_TOKENS_PER_SECOND": str(RATE)}
    pairs = []
    progress.step("a daemon with a simulated engine")
    with servers.Daemon(options, "sim", variables=variables) as daemon:
        daemon.wait_warm()
        daemon.wait_grpc()
        field = Field(daemon)
        for turn in range(rounds):
            progress.step(f"throughput, round {turn + 1} of {rounds}")
            for tokens in lengths:
                if turn % 2:
                    through = field.through(tokens, seconds)
                    pairs.append(Pair(tokens, field.straight(tokens, seconds), through))
                else:
                    straight = field.straight(tokens, seconds)
                    pairs.append(Pair(tokens, straight, field.through(tokens, seconds)))
    report_throughput(pairs, result)


def report_throughput(pairs: list[Pair], result: Result) -> None:
    """The tables, and what was to be reached."""
    by_length = {
        tokens: [pair for pair in pairs if pair.tokens == tokens]
        for tokens in sorted({pair.tokens for pair in pairs})
    }  # fmt: skip
    shares = {tokens: [pair.share for pair in group] for tokens, group in by_length.items()}
    rows = [
        [
            str(tokens),
            str(len(group)),
            number(median([pair.straight.rate for pair in group])),
            number(median([pair.through.rate for pair in group])),
            figures(shares[tokens]),
        ]
        for tokens, group in by_length.items()
    ]
    columns = ["tokens", "rounds", "calls a second, straight", "through gRPC", "ratio (min to max)"]
    result.tables.append(Table(f"Throughput of {CALLERS} callers", columns, rows))
    cost = [
        [f"{tokens}: {way}", *(microseconds([getattr(part, process) for part in parts]) for process in PROCESSES)]
        for tokens, group in by_length.items()
        for way, parts in (
            ("straight", [pair.straight for pair in group]),
            ("through gRPC", [pair.through for pair in group]),
        )
    ]
    result.tables.append(Table("Processor time of a call", ["tokens, way", *PROCESSES], cost))
    worst = min(shares, key=lambda tokens: median(shares[tokens]))
    share = median(shares[worst])
    what = f"Calls through gRPC, as a part of those straight to the engine, at worst ({worst} tokens)"
    result.goals.append(Goal(what, f"≥ {SHARE_LIMIT}", f"{share:.2f}", share >= SHARE_LIMIT))
    result.data["throughput"] = [asdict(pair) for pair in pairs]


PROCESSES = ("callers", "daemon", "engine")


def figures(values: list[float]) -> str:
    """Median, smallest and largest of ratios."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def microseconds(seconds: list[float]) -> str:
    """The median, in microseconds."""
    return f"{median(seconds) * 1e6:.0f} µs"


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
    result.goals.append(Goal(what, f"≥ {LOCK_STEP_LIMIT:g} times", f"{gain:.1f} times", gain >= LOCK_STEP_LIMIT))
    result.data["lock_step"] = [asdict(one) for one in rounds]
