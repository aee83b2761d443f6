"""``adoption``: the daemon is killed, the instances go on answering, the next daemon takes them over."""

from __future__ import annotations

import http.client
import threading
import time
from pathlib import Path
from typing import Any

from bench import client, servers
from bench.common import BenchError, Goal, Options, Progress, Result, Table, median, spread

TITLE = "Adoption: a crash of the daemon"
METHOD = """\
{count} instances ({engine}) answer one completion after the other, each asked by a thread of its own, all the time.
The daemon gets SIGKILL, {runs} times, each time when its zygote is warm; the next one is started on the same state
directory, and timed from the start of its process to its first answer to `/health`, and to a list that shows all
{count} running and ready under their old process ids. With vLLM its zygote imports vLLM at the same time."""

COUNT = 3
LIMIT = 1.0
AFTER_SECONDS = 2.0
PAUSE_SECONDS = 0.1
"""Between two completions of one instance."""


class Asker:
    """A thread that asks one server for completions until told to stop."""

    def __init__(self, url: str, model: str) -> None:
        self.times: list[float] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(url, model), daemon=True)
        self._thread.start()

    def _ask(self, url: str, model: str) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                client.complete(url, model, timeout=30.0)
            except (OSError, http.client.HTTPException, BenchError, ValueError) as problem:
                self.failures.append(repr(problem))
            self.times.append(time.monotonic() - begun)
            self._stop.wait(PAUSE_SECONDS)

    def finish(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join(60.0)


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    engine, runs = ("sim", 3) if options.quick else ("vllm", 5)
    progress.expect(2 + runs)
    progress.step("the daemon")
    model, arguments = served(options, engine)
    daemon = servers.Daemon(options, engine)
    askers: list[Asker] = []
    answering, adopted = [], []
    try:
        daemon.wait_warm()
        progress.step(f"{COUNT} instances")
        before = {}
        for _ in range(COUNT):
            document = daemon.create(arguments)
            daemon.wait_ready(document["instance_id"])
            before[document["instance_id"]] = document["pid"]
            askers.append(Asker(document["url"], model))
        for number in range(1, runs + 1):
            progress.step(f"crash {number} of {runs}")
            daemon.wait_warm()
            daemon.crash()
            daemon = daemon.successor(options, engine)
            answering.append(daemon.wait_answering() - daemon.started)
            adopted.append(wait_adopted(daemon, before) - daemon.started)
        time.sleep(AFTER_SECONDS)
        for asker in askers:
            asker.finish()
    finally:
        daemon.end()
    return report(engine, answering, adopted, askers)


def served(options: Options, engine: str) -> tuple[str, str]:
    """The model's name and the options of an instance."""
    if engine == "sim":
        return "m", "--model m"
    model: Path = servers.make_models(options)["tiny-a"]
    return str(model), " ".join(servers.vllm_arguments(model, port=0))


def wait_adopted(daemon: servers.Daemon, before: dict[str, int]) -> float:
    """Wait until all instances are listed as they were; return when."""

    def all_there() -> bool:
        now: dict[str, Any] = {one["instance_id"]: one for one in daemon.list()}
        return now.keys() == before.keys() and all(
            one["status"] == "running" and one["state"] == "ready" and one["pid"] == before[name]
            for name, one in now.items()
        )

    return client.wait_until(all_there, 30, "the instances to be adopted")


def report(engine: str, answering: list[float], adopted: list[float], askers: list[Asker]) -> Result:
    """The table and what was to be reached."""
    times = [seconds for asker in askers for seconds in asker.times]
    failures = [failure for asker in askers for failure in asker.failures]
    rows = [
        ["the next daemon answers `/health`", str(len(answering)), spread(answering)],
        ["and lists all instances as running and ready", str(len(adopted)), spread(adopted)],
        ["completions meanwhile, each", str(len(times)), spread(times, "ms")],
        ["completions that failed", str(len(failures)), "; ".join(sorted(set(failures))) or "none"],
    ]
    names = {"sim": "simulated", "vllm": "real vLLM"}
    return Result(
        TITLE,
        METHOD.format(count=COUNT, engine=names[engine], runs=len(adopted)),
        tables=[Table("After SIGKILL of the daemon", ["", "count", "median (min to max)"], rows)],
        goals=[
            Goal(
                "Adopted after the start of the next daemon",
                f"≤ {LIMIT:.0f} s",
                spread(adopted),
                median(adopted) <= LIMIT,
            ),
            Goal("Completions that failed", "none", str(len(failures) or "none"), not failures),
        ],
        data={"engine": engine, "answering": answering, "adopted": adopted, "completions": times, "failures": failures},
    )
