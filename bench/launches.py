"""``launches``: what callers of the launch API wait for, while a driver hangs, launches are stubborn, logs are long."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import client, servers
from bench.common import BenchError, Goal, Options, Progress, Result, Table, median, mib, percentile, spread
from bench.daemon import RATE, Prober, answered, at_once, latency_row, timed

TITLE = "Launches"
METHOD = """\
The launch API (`/launch`, `/status`, `/logs`, `/stop`), with simulated engines.

- **A driver that hangs**: a fake NVML with one GPU. {rate} requests a second to `/status` of a launch that is loading,
  from a process of its own, each timed from when it was due, while `/stats`, which asks the driver, is requested again
  and again; in turn with a driver that answers and with one whose every call hangs.
- **Stop**: `/stop` of launches that are ready, that are loading, and of stubborn ones, whose processes ignore SIGTERM;
  timed to its reply, and then the processes that are left are counted.
- **Logs**: the last {chunk} KiB of a log of {large} MB and of one of {small} MB, in turn; and the daemon's resident
  memory when it has read the small one, and then the large one."""

LATENCY_LIMIT = 0.050
STOP_LIMIT = 5.0
LOADING_SECONDS = 600
"""How long the engine of a launch that is loading takes to start."""
STATS_PAUSE = 0.1
SETTLE_SECONDS = 1.0
AT_ONCE = 8

MEGABYTE = 1_000_000
SMALL, LARGE = 1 * MEGABYTE, 100 * MEGABYTE
CHUNK = 64 * 1024
LOG_LIMIT = 1.5
GROWTH_LIMIT = 8 * 2**20

FAKE_NVML = Path(__file__).with_name("fake_nvml")
NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    rounds, seconds, stops, reads = (1, 2.0, 2, 50) if options.quick else (4, 6.0, 10, 500)
    progress.expect(2 * rounds + len(STOPS) + 1)
    method = METHOD.format(rate=RATE, chunk=CHUNK // 1024, large=LARGE // MEGABYTE, small=SMALL // MEGABYTE)
    result = Result(TITLE, method)
    measure_status(options, progress, rounds, seconds, result)
    measure_stops(options, progress, stops, result)
    measure_logs(options, progress, reads, (SMALL, LARGE), result)
    return result


class Launcher(servers.Daemon):
    """A daemon, asked by its launch API."""

    def launch(self) -> str:
        """Launch; return the id when the process is there."""
        launch_id = str(client.call("POST", f"{self.url}/launch", {"model": "m"})["launch_id"])
        client.wait_until(lambda: self.status(launch_id)["pid"] is not None, 60, f"the process of launch {launch_id}")
        self._pids.add(self.status(launch_id)["pid"])
        return launch_id

    def status(self, launch_id: str) -> dict[str, Any]:
        """Describe a launch."""
        document: dict[str, Any] = client.call("GET", f"{self.url}/status/{launch_id}")
        return document

    def stop(self, launch_id: str) -> dict[str, Any]:
        """Stop a launch."""
        document: dict[str, Any] = client.call("POST", f"{self.url}/stop/{launch_id}")
        return document

    def read_log(self, launch_id: str, offset: int) -> dict[str, Any]:
        """Read a piece of a launch's log."""
        document: dict[str, Any] = client.call("GET", f"{self.url}/logs/{launch_id}?offset={offset}")
        return document


# -- a driver that hangs -----------------------------------------------------------------------------------------------


def measure_status(options: Options, progress: Progress, rounds: int, seconds: float, result: Result) -> None:
    """`/status` of a launch that loads, while the driver answers and while it hangs."""
    latencies: dict[bool, list[float | None]] = {False: [], True: []}
    for number in range(1, rounds + 1):
        for hanging in latencies:
            progress.step(f"status, round {number} of {rounds}, the driver {'hangs' if hanging else 'answers'}")
            latencies[hanging] += status_while_loading(options, seconds, hanging)
    report_status(latencies[False], latencies[True], result)


def status_while_loading(options: Options, seconds: float, hanging: bool) -> list[float | None]:
    """The latencies of `/status` for so long."""
    hangs = options.folder / "nvml-hangs"
    path = [str(FAKE_NVML), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "FAKE_NVML_HANGS": str(hangs),
        "BULLPEN_SIM_START_SECONDS": str(LOADING_SECONDS),
    }
    with Launcher(options, "sim", variables=variables) as daemon:
        daemon.wait_warm()
        daemon.wait_grpc()  # its import would be measured too
        launch_id = daemon.launch()
        try:
            if hanging:
                hangs.touch()
            with asking_stats(daemon.url) as problems:
                prober = Prober.begin(options, f"{daemon.url}/status/{launch_id}")
                with prober.program:
                    time.sleep(seconds)
                    latencies = prober.finish()
            document = daemon.status(launch_id)
        finally:
            hangs.unlink(missing_ok=True)
        if document["state"] != "bootstrapping" or document["gpu_ids"] != [0]:
            raise BenchError(f"the launch should be loading on GPU 0, and is {document}")
        if any(problems) is not hanging:
            raise BenchError(f"the driver should {'hang' if hanging else 'answer'}; /stats says {problems}")
    return latencies


@contextmanager
def asking_stats(url: str) -> Iterator[list[str | None]]:
    """Ask for `/stats` again and again; what it says is wrong with the driver, each time."""
    problems: list[str | None] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            problems.append(client.call("GET", f"{url}/stats")["nvidia_smi_error"])
            ended.wait(STATS_PAUSE)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield problems
    finally:
        ended.set()
        thread.join(servers.END_SECONDS)


def report_status(calm: Sequence[float | None], hanging: Sequence[float | None], result: Result) -> None:
    """The table, and what was to be reached."""
    rows = [latency_row("the driver answers", calm), latency_row("**the driver hangs**", hanging)]
    columns = ["", "requests", "p50", "p99", "max", "failed"]
    result.tables.append(Table("`/status` of a launch that loads", columns, rows))
    worst = percentile(answered(hanging), 0.99)
    what = "p99 of `/status` while a launch loads and the driver hangs"
    limit = f"< {LATENCY_LIMIT * 1000:.0f} ms"
    reached = worst < LATENCY_LIMIT and None not in hanging
    result.goals.append(Goal(what, limit, spread([worst], "ms"), reached))
    result.data["status"] = {"calm": calm, "hanging": hanging}


# -- stop --------------------------------------------------------------------------------------------------------------

STOPS = {
    "ready": {},
    "loading": {"BULLPEN_SIM_START_SECONDS": str(LOADING_SECONDS)},
    "stubborn": {"BULLPEN_SIM_STUBBORN": "2"},
    "stubborn and loading": {"BULLPEN_SIM_STUBBORN": "2", "BULLPEN_SIM_START_SECONDS": str(LOADING_SECONDS)},
}
"""Which launches are stopped, and the environment that makes them so."""


@dataclass(frozen=True)
class Stop:
    """One stop: how long until its reply, the state that the reply names, and the processes left then."""

    seconds: float
    state: str
    left: int


def measure_stops(options: Options, progress: Progress, count: int, result: Result) -> None:
    """Stops of each kind, one after the other, and then several at once."""
    alone: dict[str, list[Stop]] = {}
    together: dict[str, list[Stop]] = {}
    for kind, variables in STOPS.items():
        progress.step(f"stops: {kind}")
        with Launcher(options, "sim", variables={**NO_GPUS, **variables}) as daemon:
            daemon.wait_warm()
            alone[kind] = [timed_stop(daemon, begun(daemon, kind)) for _ in range(count)]
            launches = [begun(daemon, kind) for _ in range(AT_ONCE)]
            together[kind] = at_once(lambda number: timed_stop(daemon, launches[number]), AT_ONCE)  # noqa: B023
    report_stops(alone, together, result)


def begun(daemon: Launcher, kind: str) -> str:
    """A launch that loads, or is ready where its kind is to be."""
    launch_id = daemon.launch()
    if "loading" not in kind:
        daemon.wait_ready(launch_id)
    return launch_id


def timed_stop(daemon: Launcher, launch_id: str) -> Stop:
    """Stop a launch."""
    processes = servers.tree(daemon.status(launch_id)["pid"])
    start = time.monotonic()
    state = str(daemon.stop(launch_id)["state"])
    seconds = time.monotonic() - start
    return Stop(seconds, state, sum(process.is_running() for process in processes))


def report_stops(alone: dict[str, list[Stop]], together: dict[str, list[Stop]], result: Result) -> None:
    """The table, and what was to be reached."""
    rows = []
    for kind, stops in alone.items():
        left = sum(stop.left for stop in (*stops, *together[kind]))
        rows.append([kind, stop_figures(stops), stop_figures(together[kind]), str(left)])
    columns = ["launches", "one after the other", f"{AT_ONCE} at once", "processes left"]
    result.tables.append(Table("`/stop`, to its reply", columns, rows))
    every = [stop for groups in (alone, together) for group in groups.values() for stop in group]
    longest = max(stop.seconds for stop in every)
    ended = all(stop.state == "stopped" and not stop.left for stop in every)
    result.goals += [
        Goal("The longest `/stop`", f"< {STOP_LIMIT:.0f} s", spread([longest]), longest < STOP_LIMIT),
        Goal("Stopped when it replies, with every process", "all", "all" if ended else "see the table", ended),
    ]
    result.data["stops"] = {
        name: {kind: [asdict(stop) for stop in group] for kind, group in stops.items()}
        for name, stops in (("alone", alone), ("together", together))
    }


def stop_figures(stops: list[Stop]) -> str:
    """How long they took."""
    return spread([stop.seconds for stop in stops])


# -- logs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """A launch's log: how large it was to be, how long its end took to read each time, the daemon's memory then."""

    size: int
    seconds: list[float]
    rss: int


def measure_logs(options: Options, progress: Progress, reads: int, sizes: tuple[int, int], result: Result) -> None:
    """The end of a small log and of a large one."""
    progress.step("the ends of logs")
    with Launcher(options, "sim", variables=NO_GPUS) as daemon:
        daemon.wait_warm()
        ids = [str(daemon.create(env_vars={"BULLPEN_SIM_LOG_BYTES": str(size)})["instance_id"]) for size in sizes]
        ends = []
        for launch_id, size in zip(ids, sizes, strict=True):
            daemon.wait_ready(launch_id)
            end = int(daemon.read_log(launch_id, 2**40)["offset"])
            if end < size:
                raise BenchError(f"the log of {launch_id} should have {size} bytes, and ends at {end}")
            ends.append(end)
        seconds: list[list[float]] = [[], []]
        memory = []
        for launch_id, end in zip(ids, ends, strict=True):
            read_end(daemon, launch_id, end)
            time.sleep(SETTLE_SECONDS)
            memory.append(psutil.Process(daemon.pid).memory_info().rss)
        for _ in range(reads):
            for number, (launch_id, end) in enumerate(zip(ids, ends, strict=True)):
                seconds[number].append(timed(lambda: read_end(daemon, launch_id, end)))  # noqa: B023
    small, large = (Log(*one) for one in zip(sizes, seconds, memory, strict=True))
    report_logs(small, large, result)


def read_end(daemon: Launcher, launch_id: str, end: int) -> None:
    """Read the last piece of a log."""
    piece = daemon.read_log(launch_id, end - CHUNK)
    if piece["next_offset"] < end:
        raise BenchError(f"a piece of a log should reach to {end}, and ends at {piece['next_offset']}")


def report_logs(small: Log, large: Log, result: Result) -> None:
    """The table, and what was to be reached."""
    rows = [
        [f"{log.size / MEGABYTE:g} MB", str(len(log.seconds)), spread(log.seconds, "ms"), mib(log.rss)]
        for log in (small, large)
    ]
    columns = ["log", "reads", "median (min to max)", "daemon's RSS after it"]
    result.tables.append(Table(f"The last {CHUNK // 1024} KiB of a log", columns, rows))
    share = median(large.seconds) / median(small.seconds)
    growth = large.rss - small.rss
    named = f"{large.size / MEGABYTE:g} MB"
    result.goals += [
        Goal(
            f"The end of {named} of log, to that of {small.size / MEGABYTE:g} MB",
            f"≤ {LOG_LIMIT} times",
            f"{share:.2f} times",
            share <= LOG_LIMIT,
        ),
        Goal(f"Growth of the daemon by reading {named}", f"≤ {mib(GROWTH_LIMIT)}", mib(growth), growth <= GROWTH_LIMIT),
    ]
    result.data["logs"] = {"small": asdict(small), "large": asdict(large)}
