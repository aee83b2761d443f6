"""``daemon``: how quick the daemon itself is and stays, with simulated engines that cost almost nothing."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench import client, servers
from bench.common import Goal, Options, Progress, Result, Table, median, mib, percentile, slope, spread

TITLE = "The daemon: start, latency, many instances, memory"
METHOD = """\
With the `sim` engine, so that what is measured is Bullpen and not vLLM. Beside the daemon runs the least that a daemon
of this kind can be, a FastAPI application with one route under uvicorn (*bare application*), measured in the same run
and under the same load; and servers without a zygote are started as fresh interpreters.

- **Start**: from the start of the process to the first 200 from `/health`.
- **Latency under load**: {rate} requests a second to `/health` from a process of its own, each timed from when it was
  due, while {stubborn} instances that ignore SIGTERM are being stopped and {starting} are starting.
- **Many instances**: created all at once, listed and watched while they run, deleted with one call; then what is left.
- **Cycles**: an instance created, ready, deleted, four at a time; resident memory of daemon and zygote meanwhile."""

RATE = 200
STUBBORN, STARTING = 8, 20
START_LIMIT = 0.5
LATENCY_LIMIT = 0.050
MANY_LIMIT = 20.0
FLAT_LIMIT = 0.02
"""How much the daemon's memory may grow over the last thousand cycles."""
WORKERS = 4

T = TypeVar("T")


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    starts, rounds, many, cycles = (3, 1, 30, 200) if options.quick else (10, 3, 100, 2500)
    progress.expect(starts + rounds + 3 + len(CHECKPOINTS))
    result = Result(TITLE, METHOD.format(rate=RATE, stubborn=STUBBORN, starting=STARTING))
    measure_start(options, progress, starts, result)
    measure_latency(options, progress, rounds, result)
    measure_many(options, progress, many, result)
    measure_cycles(options, progress, cycles, result)
    return result


def at_once(work: Callable[[int], T], count: int, workers: int | None = None) -> list[T]:
    """Do something ``count`` times, all at the same time or in so many threads."""
    with ThreadPoolExecutor(workers or count) as pool:
        return list(pool.map(work, range(count)))


class BareApp(servers.Program):
    """The application that does nothing else than answer."""

    def __init__(self, options: Options) -> None:
        port = servers.free_port()
        self.url = f"http://{servers.HOST}:{port}"
        where = ["--host", servers.HOST, "--port", str(port), "--log-level", "warning", "--no-access-log"]
        command = [sys.executable, "-m", "uvicorn", "bench.bare_app:app", *where]
        super().__init__(command, options.folder / f"bare-{port}.log", servers.environment(options))

    def wait_answering(self) -> float:
        """Wait for the first answer; return when it came."""
        return client.wait_until(lambda: client.answers(f"{self.url}/health"), 60, "the bare application")


# -- start ---------------------------------------------------------------------------------------------------------


def measure_start(options: Options, progress: Progress, runs: int, result: Result) -> None:
    """From the start of the process to the first answer, while the zygote warms."""
    times: dict[str, list[float]] = {"bare application": [], "Bullpen, engine sim": [], "Bullpen, engine vllm": []}
    for number in range(1, runs + 1):
        progress.step(f"start {number} of {runs}")
        makers: list[Callable[[], BareApp | servers.Daemon]] = [
            lambda: BareApp(options),
            lambda: servers.Daemon(options, "sim"),
            lambda: servers.Daemon(options, "vllm"),
        ]
        for name, make in zip(times, makers, strict=True):
            with make() as program:
                times[name].append(program.wait_answering() - program.started)
    bare = median(times["bare application"])
    rows = [[name, str(runs), spread(values), f"{median(values) / bare:.2f} times"] for name, values in times.items()]
    ready = times["Bullpen, engine vllm"]
    reached = median(ready) <= START_LIMIT
    result.goals.append(Goal("`/health` after the start of the daemon", f"≤ {START_LIMIT} s", spread(ready), reached))
    note = "With vLLM the zygote is importing it meanwhile, and takes a core for that."
    result.tables.append(
        Table("Start to the first `/health`", ["", "runs", "median (min to max)", "to the bare one"], rows, note)
    )
    result.data["start"] = times


# -- latency -------------------------------------------------------------------------------------------------------


@dataclass
class Prober:
    """A running prober, and what it asks."""

    program: servers.Program

    @classmethod
    def begin(cls, options: Options, url: str) -> Prober:
        """Begin to ask."""
        command = [sys.executable, "-m", "bench.prober", url, str(RATE)]
        program = servers.Program(command, options.folder / "prober.log", servers.environment(options), pipes=True)
        program.hear()
        return cls(program)

    def finish(self) -> list[float | None]:
        """Stop asking; return the latencies."""
        assert self.program.process.stdin is not None
        self.program.process.stdin.close()
        latencies: list[float | None] = json.loads(self.program.hear())
        self.program.end()
        return latencies


def measure_latency(options: Options, progress: Progress, rounds: int, result: Result) -> None:
    """`/health` while instances are stopped and started, at Bullpen and at the bare application."""
    ours: list[float | None] = []
    bare: list[float | None] = []
    each = []
    for number in range(1, rounds + 1):
        progress.step(f"latency, round {number} of {rounds}")
        round_ours, round_bare = latency_under_load(options)
        ours += round_ours
        bare += round_bare
        each.append(percentile(answered(round_ours), 0.99))
    rows = [latency_row("Bullpen", ours), latency_row("bare application", bare)]
    columns = ["", "requests", "p50", "p99", "max", "failed"]
    share = percentile(answered(ours), 0.99) / percentile(answered(bare), 0.99)
    note = f"p99 of Bullpen is {share:.1f} times the bare application's; of each round: {spread(each, 'ms')}."
    title = f"`/health` while {STUBBORN} stubborn instances stop and {STARTING} start"
    result.tables.append(Table(title, columns, rows, note))
    worst = percentile(answered(ours), 0.99)
    limit = f"< {LATENCY_LIMIT * 1000:.0f} ms"
    result.goals.append(Goal("p99 of `/health` under load", limit, spread([worst], "ms"), worst < LATENCY_LIMIT))
    result.data["latency"] = {"bullpen": ours, "bare": bare}


def answered(latencies: Sequence[float | None]) -> list[float]:
    """Those of requests that did not fail."""
    return [latency for latency in latencies if latency is not None]


def latency_row(what: str, latencies: Sequence[float | None]) -> list[str]:
    """One line of the table."""
    good = answered(latencies)
    figures = (percentile(good, 0.5), percentile(good, 0.99), max(good))
    return [what, str(len(latencies)), *(spread([figure], "ms") for figure in figures), str(len(latencies) - len(good))]


def latency_under_load(options: Options) -> tuple[list[float | None], list[float | None]]:
    """One round: the latencies of Bullpen and of the bare application."""
    with ExitStack() as stack:
        bare = stack.enter_context(BareApp(options))
        daemon = stack.enter_context(servers.Daemon(options, "sim", stop_timeout=2)).wait_warm()
        bare.wait_answering()
        stubborn = at_once(lambda _: daemon.create(env_vars={"BULLPEN_SIM_STUBBORN": "2"})["instance_id"], STUBBORN)
        for instance_id in stubborn:
            daemon.wait_ready(instance_id)
        probers = [Prober.begin(options, f"{url}/health") for url in (daemon.url, bare.url)]
        for prober in probers:
            stack.enter_context(prober.program)

        def load(number: int) -> None:
            if number < STUBBORN:
                daemon.delete(stubborn[number])
            else:
                daemon.create(env_vars={"BULLPEN_SIM_START_SECONDS": "2"})

        at_once(load, STUBBORN + STARTING)
        client.wait_until(lambda: all_ready(daemon), 60, "the instances", pause=0.2)
        ours, theirs = (prober.finish() for prober in probers)
        return ours, theirs


def all_ready(daemon: servers.Daemon) -> bool:
    """Whether the daemon has seen every instance ready."""
    return all(one["state"] == "ready" for one in daemon.list())


# -- many instances ------------------------------------------------------------------------------------------------


@dataclass
class Traces:
    """What instances leave behind, or not."""

    descriptors: int
    files: int
    shared_memory: int

    @classmethod
    def of(cls, daemon: servers.Daemon) -> Traces:
        """Count."""
        files = [path for folder in ("logs", "run") for path in (daemon.state / folder).glob("*")]
        descriptors = psutil.Process(daemon.pid).num_fds()
        return cls(descriptors, len(files), len(list(Path("/dev/shm").iterdir())))


def measure_many(options: Options, progress: Progress, count: int, result: Result) -> None:
    """Many instances at once, from the first request to nothing left."""
    with servers.Daemon(options, "sim") as daemon:
        daemon.wait_warm()
        before = Traces.of(daemon)
        progress.step(f"{count} instances at once")
        begun = time.monotonic()
        documents = at_once(lambda _: daemon.create(), count)
        created = time.monotonic() - begun
        client.wait_until(lambda: all_ready(daemon), 120, "the instances", pause=0.02)
        ready = time.monotonic() - begun
        processes = [process for one in documents for process in servers.tree(one["pid"])]
        lists = [timed(daemon.list) for _ in range(50)]
        watches = [timed(lambda: first_watch_line(daemon.instances)) for _ in range(20)]
        progress.step(f"{count} instances deleted")
        deleted = timed(lambda: client.call("DELETE", daemon.instances))
        left = left_behind(daemon, before, processes, [int(one["url"].rpartition(":")[2]) for one in documents])
    progress.step(f"{count} interpreters, for comparison")
    by_hand = start_by_hand(options, count)
    rows = [
        ["created, all replies there", spread([created])],
        ["all ready", spread([ready])],
        ["for comparison: as many simulators started as fresh interpreters, all ready", spread([by_hand])],
        [
            "list with all details",
            f"p50 {spread([percentile(lists, 0.5)], 'ms')}, p99 {spread([percentile(lists, 0.99)], 'ms')}",
        ],
        ["first line of a watch", spread(watches, "ms")],
        ["deleted, nothing left when the reply comes", spread([deleted])],
        *([f"left after that: {what}", str(value)] for what, value in left.items()),
    ]
    result.tables.append(Table(f"{count} instances at once", ["", ""], rows))
    clean = not any(left.values())
    result.goals += [
        Goal(f"{count} created", f"≤ {MANY_LIMIT:.0f} s", spread([created]), created <= MANY_LIMIT),
        Goal(f"{count} deleted", f"≤ {MANY_LIMIT:.0f} s", spread([deleted]), deleted <= MANY_LIMIT),
        Goal("Left of them", "nothing", "nothing" if clean else "see the table", clean),
    ]
    result.data["many"] = {
        "count": count, "created": created, "ready": ready, "by_hand": by_hand, "list": lists, "watch": watches,
        "deleted": deleted, "left": left,
    }  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """How long something takes."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def first_watch_line(instances: str) -> None:
    """Open a watch and read one line."""
    with client.connection(instances, 30.0) as opened:
        opened.request("GET", "/v2/vllm/instances/watch")
        opened.getresponse().readline()


def left_behind(
    daemon: servers.Daemon, before: Traces, processes: Sequence[psutil.Process], ports: Sequence[int]
) -> dict[str, int]:
    """What is left of deleted instances. Connections of our own are given a moment to end, and so is what the daemon
    has open for an instant only (its housekeeping, each 2 s)."""
    lives = sum(process.is_running() for process in processes)
    looks = []
    for _ in range(6):
        time.sleep(0.5)
        looks.append(Traces.of(daemon))
    now = min(looks, key=lambda one: one.descriptors)
    return {
        "processes": lives,
        "ports": sum(is_taken(port) for port in ports),
        "descriptors of the daemon": now.descriptors - before.descriptors,
        "files": now.files - before.files,
        "shared memory": now.shared_memory - before.shared_memory,
    }


def is_taken(port: int) -> bool:
    """Whether somebody has a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((servers.HOST, port))
        except OSError:
            return True
    return False


def start_by_hand(options: Options, count: int) -> float:
    """Start simulators as fresh interpreters, all at once, until all are ready."""
    with ExitStack() as stack:
        begun = time.monotonic()
        urls = []
        for _ in range(count):
            port = servers.free_port()
            command = [sys.executable, "-m", "bullpen.sim", "--model", "m", "--host", servers.HOST, "--port", str(port)]
            stack.enter_context(servers.Program(command, options.folder / "by-hand.log", servers.environment(options)))
            urls.append(f"http://{servers.HOST}:{port}/health")
        for url in urls:
            client.wait_until(lambda url=url: client.answers(url), 120, "a simulator")  # type: ignore[misc]
        return time.monotonic() - begun


# -- cycles --------------------------------------------------------------------------------------------------------

CHECKPOINTS = (0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""When memory is looked at, as shares of all cycles."""
BUFFERS_FULL = 0.6
"""From here on, a full thousand cycles, memory is judged. Before, buffers fill: events for watchers, SQLite's pages."""


def measure_cycles(options: Options, progress: Progress, cycles: int, result: Result) -> None:
    """Create and delete again and again; memory, threads and descriptors meanwhile."""
    points: list[dict[str, Any]] = []
    with servers.Daemon(options, "sim") as daemon:
        daemon.wait_warm()
        done, seconds = 0, 0.0
        for share in CHECKPOINTS:
            until = round(share * cycles)
            progress.step(f"{until} of {cycles} cycles")
            seconds += timed(lambda until=until, done=done: at_once(lambda _: cycle(daemon), until - done, WORKERS))  # type: ignore[misc]
            done = until
            time.sleep(0.5)
            own, zygote = psutil.Process(daemon.pid), daemon.zygote()
            points.append(
                {
                    "cycles": done,
                    "rss": own.memory_info().rss,
                    "zygote_rss": zygote.memory_info().rss,
                    "descriptors": own.num_fds(),
                    "threads": own.num_threads(),
                }
            )
    columns = ["cycles", "daemon's RSS", "zygote's RSS", "descriptors", "threads"]
    rows = [
        [str(one["cycles"]), mib(one["rss"]), mib(one["zygote_rss"]), str(one["descriptors"]), str(one["threads"])]
        for one in points
    ]
    late = [(float(one["cycles"]), float(one["rss"])) for one in points if one["cycles"] >= BUFFERS_FULL * cycles]
    growth = late[-1][1] / late[0][1] - 1
    note = (
        f"From there on: {slope(late) / 1024:.2f} KiB a cycle; before, buffers fill."
        f" {cycles / seconds:.1f} cycles a second."
    )
    result.tables.append(Table("Memory over cycles of create and delete", columns, rows, note))
    what = f"Growth of the daemon from cycle {late[0][0]:.0f} to {cycles}"
    result.goals.append(Goal(what, f"≤ {FLAT_LIMIT:.0%}", f"{growth:+.1%}", growth <= FLAT_LIMIT))
    result.data["cycles"] = {"points": points, "seconds": seconds}


def cycle(daemon: servers.Daemon) -> None:
    """One instance's whole life."""
    instance_id = daemon.create()["instance_id"]
    daemon.wait_ready(instance_id)
    daemon.delete(instance_id)
