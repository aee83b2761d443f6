"""``gpu-sleep MODEL …``: real vLLM on an NVIDIA GPU: start, sleep, wake and swap; times and memory of each model.

A model is a folder or a name in the local cache of models; nothing is downloaded. Without any, the tiny models are
served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import client, gpu_common, servers
from bench.common import BenchError, Goal, Options, Progress, Result, Table, median, ratio, spread

TITLE = "Sleep, wake and swap on a GPU"
METHOD = """\
On {hardware}. One model after the other has the GPU: first with `vllm serve`, started from nothing, until its first
token; then as an instance of Bullpen, until its first token, and to sleep and awake again at both levels of vLLM's
sleep mode; the options are the same (`{options}`), and Bullpen adds what sleep needs. Sleep is timed to its reply, wake
to its reply and to the first piece of a streamed completion asked for then. Then the first two models are swapped there
and back, one asleep at level 1. GPU memory is the whole GPU's by NVML, less what was held before the first start. Files
are in the page cache from the first start on."""

OPTIONS = ("--gpu-memory-utilization", "0.8")
"""The same for every way of starting a server; what is left has room for the one that sleeps."""
LEVELS = (1, 2)
PATIENCE_SECONDS = 1800.0
"""How long a start, a sleep or a wake may take; models can be large."""


@dataclass(frozen=True)
class Bed:
    """Where it is measured: a GPU, and the engine that serves there.

    Attributes:
        engine: the engine of the daemon's instances.
        command: the same engine's own server, from its arguments.
        state: the daemon's state directory.
        settings: the daemon's settings beside the usual.
        variables: the environment of the engine's own server beside the usual.
    """

    device: gpu_common.Device
    engine: str
    command: Callable[[list[str]], list[str]]
    state: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """A start: seconds to the first token, MiB on the GPU then, and the text."""

    first_token: float
    gpu_mib: int
    text: str


@dataclass(frozen=True)
class Nap:
    """A sleep and the wake after it: seconds to either's reply, and from the wake's call to the first token; MiB on the
    GPU awake and asleep; whether it answers as before."""

    sleep: float
    wake: float
    first_token: float
    awake_mib: int
    asleep_mib: int
    same: bool


@dataclass
class Measured:
    """What was measured of a model, and what did not work."""

    model: str
    cold: list[Start] = field(default_factory=list)
    warm: list[Start] = field(default_factory=list)
    naps: dict[int, list[Nap]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Swap:
    """A swap: seconds to its reply, and from its call to the first token of the incoming model; whether its answer is
    as before."""

    reply: float
    first_token: float
    same: bool


def run(options: Options, progress: Progress) -> Result:
    """Measure; UnavailableError says what this machine lacks."""
    device = gpu_common.find_device()
    gpu_common.require_cuda("torch")
    gpu_common.require_cuda("vllm")
    models = options.gpu_models or tuple(map(str, servers.make_models(options).values()))
    bed = Bed(device, "vllm", servers.own_server_command, options.folder / "state-gpu")
    return measure(options, progress, bed, models)


def measure(options: Options, progress: Progress, bed: Bed, models: tuple[str, ...]) -> Result:
    """Measure each model, then swaps of the first two."""
    starts, runs = (1, 2) if options.quick else (3, 5)
    progress.expect(1 + 2 * len(models) + (len(models) > 1))
    found = [Measured(model) for model in models]
    for one in found:
        progress.step(f"{one.model}: cold")
        attempt(one, lambda one=one: measure_cold(options, bed, one, starts))  # type: ignore[misc]
    progress.step("Bullpen imports the engine")
    variables = dict(bed.device.visible)
    swaps: list[Swap] = []
    with servers.Daemon(options, bed.engine, bed.state, variables, **bed.settings) as daemon:
        daemon.wait_warm()
        before = bed.device.used_mib()
        for one in found:
            progress.step(f"{one.model}: Bullpen")
            attempt(one, lambda one=one: measure_model(bed, daemon, one, starts, runs, before))  # type: ignore[misc]
            client.call("DELETE", daemon.instances)
            bed.device.wait_used(before)
        if len(found) > 1:
            progress.step("swaps")
            attempt(found[0], lambda: swaps.extend(measure_swaps(bed, daemon, models[:2], runs)))
    return report(bed, found, swaps)


def attempt(measured: Measured, work: Callable[[], object]) -> None:
    """Do a part of the work; what does not work is noted, and the next part has its turn."""
    try:
        work()
    except (BenchError, OSError) as problem:
        measured.problems.append(str(problem))


class ColdServer(servers.Program):
    """The engine's own server, started from nothing."""

    def __init__(self, options: Options, bed: Bed, model: str) -> None:
        port = servers.free_port()
        self.url = f"http://{servers.HOST}:{port}"
        arguments = ["--model", model, *OPTIONS, "--host", servers.HOST, "--port", str(port)]
        environment = servers.environment(options, **bed.device.visible, **bed.variables)
        super().__init__(bed.command(arguments), options.folder / f"cold-{port}.log", environment)


def measure_cold(options: Options, bed: Bed, measured: Measured, runs: int) -> None:
    """Start the engine's own server so many times."""
    for _ in range(runs):
        before = bed.device.used_mib()
        with ColdServer(options, bed, measured.model) as server:
            answer = client.first_answer(server.url, measured.model, PATIENCE_SECONDS, server.alive)
            held = bed.device.used_mib() - before
            measured.cold.append(Start(answer.at - server.started, held, answer.text))
        bed.device.wait_used(before)


def measure_model(bed: Bed, daemon: servers.Daemon, measured: Measured, starts: int, runs: int, before: int) -> None:
    """Start a model by Bullpen so many times; the last one sleeps and wakes at both levels."""
    instance_id = ""
    for _ in range(starts):
        if instance_id:
            daemon.delete(instance_id)
            bed.device.wait_used(before)
        begun = time.monotonic()
        instance_id, url = create(daemon, bed, measured.model)
        answer = client.complete(url, measured.model)
        held = bed.device.used_mib() - before
        measured.warm.append(Start(answer.at - begun, held, answer.text))
    for level in LEVELS:
        attempt(measured, lambda level=level: measure_level(bed, daemon, instance_id, measured, level, runs, before))  # type: ignore[misc]


def measure_level(
    bed: Bed, daemon: servers.Daemon, instance_id: str, measured: Measured, level: int, runs: int, before: int
) -> None:
    """Have an instance sleep at one level, and wake, so many times."""
    for _ in range(runs):
        measured.naps[level].append(nap(bed, daemon, instance_id, measured, level, before))


def create(daemon: servers.Daemon, bed: Bed, model: str) -> tuple[str, str]:
    """Start an instance that may sleep; return its id and URL when it is ready."""
    arguments = " ".join(["--model", model, *OPTIONS])
    document = daemon.create(arguments, gpu_uuids=[bed.device.gpu.uuid], sleep="engine")
    instance_id: str = document["instance_id"]
    return instance_id, daemon.wait_ready(instance_id, PATIENCE_SECONDS)["url"]


def nap(bed: Bed, daemon: servers.Daemon, instance_id: str, measured: Measured, level: int, before: int) -> Nap:
    """One sleep and wake."""
    awake = bed.device.used_mib() - before
    begun = time.monotonic()
    document = put_to_sleep(daemon, instance_id, level)
    slept = time.monotonic()
    if document.get("sleep_level") != level:
        raise BenchError(f"asked to sleep at level {level}, it sleeps at {document.get('sleep_level')}")
    asleep = bed.device.used_mib() - before
    called = time.monotonic()
    document = client.call("POST", f"{daemon.instances}/{instance_id}/wake", timeout=PATIENCE_SECONDS)
    woken = time.monotonic()
    answer = client.complete(document["url"], measured.model)
    same = answer.text == measured.warm[-1].text
    return Nap(slept - begun, woken - called, answer.at - called, awake, asleep, same)


def put_to_sleep(daemon: servers.Daemon, instance_id: str, level: int) -> dict[str, Any]:
    """Have an instance sleep; return the reply, which comes when it does."""
    url = f"{daemon.instances}/{instance_id}/sleep?level={level}"
    document: dict[str, Any] = client.call("POST", url, timeout=PATIENCE_SECONDS)
    return document


def measure_swaps(bed: Bed, daemon: servers.Daemon, models: tuple[str, ...], runs: int) -> list[Swap]:
    """Swap two models there and back so many times."""
    incoming, url = create(daemon, bed, models[0])
    texts = {incoming: client.complete(url, models[0]).text}
    put_to_sleep(daemon, incoming, level=1)
    outgoing, url = create(daemon, bed, models[1])
    texts[outgoing] = client.complete(url, models[1]).text
    names = {incoming: models[0], outgoing: models[1]}
    swaps = []
    for _ in range(2 * runs):
        begun = time.monotonic()
        document = daemon.swap(incoming, outgoing)["in"]
        replied = time.monotonic()
        answer = client.complete(document["url"], names[incoming])
        swaps.append(Swap(replied - begun, answer.at - begun, answer.text == texts[incoming]))
        incoming, outgoing = outgoing, incoming
    return swaps


# -- the tables ------------------------------------------------------------------------------------------------------


def report(bed: Bed, found: list[Measured], swaps: list[Swap]) -> Result:
    """The tables and what was to be reached."""
    troubles = " ".join(f"{one.model}: {problem}." for one in found for problem in one.problems)
    naps = [nap for one in found for level in LEVELS for nap in one.naps[level]]
    same = not troubles and all(nap.same for nap in naps) and all(swap.same for swap in swaps)
    result = Result(TITLE, METHOD.format(hardware=gpu_common.describe(bed.device), options=" ".join(OPTIONS)))
    columns = ["", "runs", "first token", "share of cold", "GPU memory"]
    result.tables.append(Table("To the first token", columns, start_rows(found), troubles))
    columns = ["", "runs", "sleep", "wake", "first token", "share of cold", "GPU memory awake", "asleep"]
    note = "*First token* counts from the call to wake."
    result.tables.append(Table("Sleep and wake", columns, nap_rows(found), note))
    if swaps:
        rows = [
            ["reply, the incoming one is ready", str(len(swaps)), spread([one.reply for one in swaps])],
            ["first token of the incoming one", str(len(swaps)), spread([one.first_token for one in swaps])],
        ]
        title = f"Swap of {found[0].model} and {found[1].model}, level 1"
        result.tables.append(Table(title, ["", "swaps", "median (min to max)"], rows))
    result.goals.append(
        Goal(
            "The same completion after each sleep and swap on a GPU",
            "the same",
            "the same" if same else "see there",
            same,
        )
    )
    result.data = {"models": [asdict(one) for one in found], "swaps": [asdict(one) for one in swaps]}
    return result


def start_rows(found: list[Measured]) -> list[list[str]]:
    """A line for each model and way to start it."""
    rows = []
    for one in found:
        for way, starts in (("cold", one.cold), ("**Bullpen**", one.warm)):
            if starts:
                seconds = [start.first_token for start in starts]
                held = f"{median([start.gpu_mib for start in starts]):,.0f} MiB"
                rows.append([f"{one.model}: {way}", str(len(starts)), spread(seconds), to_cold(seconds, one), held])
    return rows


def nap_rows(found: list[Measured]) -> list[list[str]]:
    """A line for each model and level."""
    rows = []
    for one in found:
        for level, naps in one.naps.items():
            if not naps:
                continue
            first = [nap.first_token for nap in naps]
            rows.append(
                [
                    f"{one.model}: level {level}",
                    str(len(naps)),
                    spread([nap.sleep for nap in naps]),
                    spread([nap.wake for nap in naps]),
                    spread(first),
                    to_cold(first, one),
                    f"{median([nap.awake_mib for nap in naps]):,.0f} MiB",
                    f"{median([nap.asleep_mib for nap in naps]):,.0f} MiB",
                ]
            )
    return rows


def to_cold(seconds: list[float], measured: Measured) -> str:
    """As a share of the model's cold start; empty where that did not work."""
    cold = [start.first_token for start in measured.cold]
    return ratio(median(seconds), median(cold)) if cold else ""
