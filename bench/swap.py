"""``swap``: one model for another, simulated for what Bullpen itself takes, and with real vLLM by an emulated sleep."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import client, servers
from bench.common import Goal, Options, Progress, Result, Table, median, percentile, spread

TITLE = "Swap: one model for another"
METHOD = """\
- **What a swap adds**: two simulated engines share a mock GPU; each takes {engine:.0f} ms to sleep and {engine:.0f} ms
  to wake. `POST /v2/vllm/swap` is timed to its reply: requests in flight ended, one asleep, memory seen free, the other
  awake and its answer compared with the one before its sleep. In turn with each swap, two servers of the same kind
  without Bullpen are told `POST /sleep` and `POST /wake_up`, the one after the other, with nothing looked at. The
  *overhead* is the swap without the {both:.0f} ms that the engines are told to take; what their own servers take on top
  of that counts as Bullpen's.
- **Real vLLM on the CPU** cannot sleep; with `sleep: emulate` the one that goes out is stopped and keeps its slot, and
  the one that comes in is forked. Two tiny models, a swap one way and one back, and a *fork alone* (a new instance of
  one of them, created while nothing else is done) in each round; a second between any two for the next spare to be
  forked. Timed from the call to the first piece of a streamed completion, asked for when the swap has replied, or
  again and again every {poll:.0f} ms after the create."""

ENGINE_SECONDS = 0.02
"""How long the simulated engine takes to sleep, and to wake."""
OVERHEAD_LIMIT = 0.020
FIRST_TOKEN_LIMIT = 1.3
SPARE_SECONDS = 1.0
GPU = "GPU-0"
SIMULATED_TIMES = {
    "BULLPEN_SIM_SLEEP_SECONDS": str(ENGINE_SECONDS),
    "BULLPEN_SIM_WAKE_SECONDS": str(ENGINE_SECONDS),
}


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    swaps, rounds = (20, 2) if options.quick else (200, 10)
    progress.expect(4 + rounds)
    result = Result(
        TITLE,
        METHOD.format(engine=ENGINE_SECONDS * 1000, both=2 * ENGINE_SECONDS * 1000, poll=client.POLL_SECONDS * 1000),
    )
    measure_overhead(options, progress, swaps, result)
    progress.step("the models")
    models = list(servers.make_models(options).values())
    measure_emulated(options, progress, rounds, Served.vllm(models), result)
    return result


# -- what a swap adds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """One swap, in seconds: until its reply, and its stages as the daemon counts them."""

    seconds: float
    going_out: float
    coming_in: float

    @property
    def overhead(self) -> float:
        """What it takes beyond what the engines are told to take."""
        return self.seconds - 2 * ENGINE_SECONDS


class BareSimulator(servers.Program):
    """A simulated engine without Bullpen, its development mode on."""

    def __init__(self, options: Options) -> None:
        port = servers.free_port()
        self.url = f"http://{servers.HOST}:{port}"
        arguments = ["--model", "m", "--enable-sleep-mode", "--host", servers.HOST, "--port", str(port)]
        environment = servers.environment(options, VLLM_SERVER_DEV_MODE="1", **SIMULATED_TIMES)
        log = options.folder / f"simulator-{port}.log"
        super().__init__([sys.executable, "-m", "bullpen.sim", *arguments], log, environment)

    def wait_answering(self) -> float:
        """Wait for the first answer; return when it came."""
        return client.wait_until(lambda: client.answers(f"{self.url}/health"), 60, "a simulator")

    def sleep(self) -> None:
        """Tell it to sleep at level 1."""
        self._post("/sleep?level=1&mode=abort")

    def wake(self) -> None:
        """Tell it to wake."""
        self._post("/wake_up")

    def _post(self, path: str) -> None:
        client.send("POST", f"{self.url}{path}")


def measure_overhead(options: Options, progress: Progress, count: int, result: Result) -> None:
    """Swaps of two simulated engines, in turn with the bare calls that a swap consists of."""
    progress.step("two simulated engines on one mock GPU, and two without Bullpen")
    with ExitStack() as stack:
        daemon = stack.enter_context(servers.Daemon(options, "sim", mock_gpus=True)).wait_warm()
        awake = create(daemon, "--model m", gpu_uuids=[GPU], env_vars=SIMULATED_TIMES)
        client.call("POST", f"{daemon.instances}/{awake}/sleep")
        asleep, awake = awake, create(daemon, "--model m", gpu_uuids=[GPU], env_vars=SIMULATED_TIMES)
        bare_awake, bare_asleep = (stack.enter_context(BareSimulator(options)) for _ in range(2))
        for one in (bare_awake, bare_asleep):
            one.wait_answering()
        bare_asleep.sleep()
        progress.step(f"{count} swaps")
        swaps: list[Swap] = []
        bare: list[float] = []
        for _ in range(count):
            swaps.append(timed_swap(daemon, asleep, awake))
            asleep, awake = awake, asleep
            begun = time.monotonic()
            bare_awake.sleep()
            bare_asleep.wake()
            bare.append(time.monotonic() - begun)
            bare_awake, bare_asleep = bare_asleep, bare_awake
    report_overhead(swaps, bare, result)


def create(daemon: servers.Daemon, arguments: str, **fields: Any) -> str:
    """Start an instance; return its id when it is ready."""
    instance_id: str = daemon.create(arguments, **fields)["instance_id"]
    daemon.wait_ready(instance_id, servers.START_SECONDS)
    return instance_id


def timed_swap(daemon: servers.Daemon, incoming: str, outgoing: str) -> Swap:
    """One swap of two instances that are there."""
    begun = time.monotonic()
    stages = daemon.swap(incoming, outgoing)["stages"]
    seconds = time.monotonic() - begun
    return Swap(seconds, stages["in"] - stages["out"], stages["done"] - stages["in"])


def report_overhead(swaps: list[Swap], bare: list[float], result: Result) -> None:
    """The table of the simulated engines, and what was to be reached."""
    whole = [swap.seconds for swap in swaps]
    overhead = [swap.overhead for swap in swaps]
    bare_overhead = [seconds - 2 * ENGINE_SECONDS for seconds in bare]
    rows = [
        latency_row("the swap, until its reply", whole),
        latency_row("in the daemon: going out", [swap.going_out for swap in swaps]),
        latency_row("in the daemon: coming in", [swap.coming_in for swap in swaps]),
        latency_row("the engines' own calls, without Bullpen", bare),
        latency_row("**overhead of the swap**", overhead),
        latency_row("overhead of the engines' own calls", bare_overhead),
    ]
    note = f"A swap takes {median(whole) / median(bare):.2f} times as long as the engines' own calls."
    result.tables.append(Table("What a swap adds", ["", "swaps", "median (min to max)", "p99"], rows, note))
    limit = f"< {OVERHEAD_LIMIT * 1000:.0f} ms"
    reached = median(overhead) < OVERHEAD_LIMIT
    result.goals.append(Goal("A swap's own overhead, median", limit, spread([median(overhead)], "ms"), reached))
    result.data["overhead"] = {"swaps": [asdict(swap) for swap in swaps], "bare": bare}


def latency_row(what: str, seconds: list[float]) -> list[str]:
    """One line of the table."""
    return [what, str(len(seconds)), spread(seconds, "ms"), spread([percentile(seconds, 0.99)], "ms")]


# -- real engines, emulated sleep --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What the instances of a measurement are: an engine, two models, and the options of an instance of each."""

    engine: str
    models: list[str]
    arguments: list[str]

    @classmethod
    def vllm(cls, models: list[Path]) -> Served:
        """Real vLLM."""
        return cls(
            "vllm", [str(model) for model in models], [" ".join(servers.vllm_arguments(model, 0)) for model in models]
        )

    @classmethod
    def sim(cls) -> Served:
        """The simulator in its place, to try the course of this benchmark."""
        return cls("sim", ["m", "n"], ["--model m", "--model n"])


@dataclass(frozen=True)
class FirstToken:
    """One swap or start, in seconds since the call: its reply, and the first token; and which text it was."""

    reply: float
    first_token: float
    model: str
    text: str


def measure_emulated(options: Options, progress: Progress, rounds: int, served: Served, result: Result) -> None:
    """Swaps there and back, in turn with forks alone."""
    progress.step("Bullpen imports the engine")
    with servers.Daemon(options, served.engine) as daemon:
        daemon.wait_warm()
        one, other = (create(daemon, arguments, sleep="emulate") for arguments in served.arguments)
        expected = {
            model: client.complete(daemon.instance(name)["url"], model).text
            for name, model in zip((one, other), served.models, strict=True)
        }
        client.call("POST", f"{daemon.instances}/{one}/sleep")
        swapped: list[FirstToken] = []
        alone: list[FirstToken] = []
        for number in range(1, rounds + 1):
            progress.step(f"round {number} of {rounds}")
            time.sleep(SPARE_SECONDS)
            swapped.append(swap_in(daemon, one, other, served.models[0]))
            time.sleep(SPARE_SECONDS)
            alone.append(fork_alone(daemon, served.arguments[1], served.models[1]))
            time.sleep(SPARE_SECONDS)
            swapped.append(swap_in(daemon, other, one, served.models[1]))
    same = all(one.text == expected[one.model] for one in (*swapped, *alone))
    report_emulated(swapped, alone, same, result)


def swap_in(daemon: servers.Daemon, incoming: str, outgoing: str, model: str) -> FirstToken:
    """One swap, and a completion of the incoming model."""
    begun = time.monotonic()
    document = daemon.swap(incoming, outgoing)["in"]
    replied = time.monotonic()
    answer = client.complete(document["url"], model)
    return FirstToken(replied - begun, answer.at - begun, model, answer.text)


def fork_alone(daemon: servers.Daemon, arguments: str, model: str) -> FirstToken:
    """One new instance and its first completion; it is deleted again."""
    begun = time.monotonic()
    document = daemon.create(arguments)
    replied = time.monotonic()
    instance_id = document["instance_id"]

    def alive() -> bool:
        return bool(daemon.instance(instance_id)["status"] == "running")

    answer = client.first_answer(document["url"], model, servers.START_SECONDS, alive)
    daemon.delete(instance_id)
    return FirstToken(replied - begun, answer.at - begun, model, answer.text)


def report_emulated(swapped: list[FirstToken], alone: list[FirstToken], same: bool, result: Result) -> None:
    """The table of the real engines, and what was to be reached."""
    ours = [one.first_token for one in swapped]
    forks = [one.first_token for one in alone]
    rows = [
        ["fork alone: first token", str(len(alone)), spread(forks), "1"],
        ["swap: reply, the incoming one is ready", *figures([one.reply for one in swapped], forks)],
        ["**swap: first token**", *figures(ours, forks)],
    ]
    said = "Every model gave the same completion each time." if same else "**A model's completions differ.**"
    columns = ["", "runs", "median (min to max)", "to the fork alone"]
    result.tables.append(Table("Swap by an emulated sleep, real vLLM on the CPU", columns, rows, said))
    result.goals += [
        Goal(
            "First token of the incoming model after the call, each time",
            f"≤ {FIRST_TOKEN_LIMIT} s",
            spread(ours),
            max(ours) <= FIRST_TOKEN_LIMIT,
        ),
        Goal("The same completion after each swap", "the same", "the same" if same else "different", same),
    ]
    result.data["emulated"] = {"swaps": [asdict(one) for one in swapped], "alone": [asdict(one) for one in alone]}


def figures(seconds: list[float], base: list[float]) -> list[str]:
    """The rest of a line of that table."""
    return [str(len(seconds)), spread(seconds), f"{median(seconds) / median(base):.2f} times"]
