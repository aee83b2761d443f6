"""``memory``: what one more server costs, from Bullpen and by itself."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from bench import client, servers
from bench.common import Goal, Options, Progress, Result, Table, mib, ratio

TITLE = "Memory: what a further server costs"
METHOD = """\
The proportional set size (PSS, `/proc/PID/smaps_rollup`) of whole process trees, each server having answered one
completion: a page that *n* processes share counts 1/*n* in each. First separately started servers (`vllm serve`), one
and then two; then, with those gone, Bullpen's zygote with its spare and 0 to {count} instances. **A further server** is
what the total grows by with it, so what it shares with the others costs nothing, on both sides. *Private* pages are
those that one process alone has mapped.

Weights ({weights}) are the model's files. How much of the KV cache (64 MiB) is really in memory is measured with one
more instance that has four times as much: {touched:.0%}. Both are taken off each further server before the ratio is
made."""

LIMIT = 3
"""How many times smaller a further instance must be than a further server started separately."""
COUNT = 3
SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Memory:
    """Bytes of several processes together."""

    processes: int
    pss: int
    private: int

    def __sub__(self, other: Memory) -> Memory:
        """What has been added since ``other``."""
        return Memory(self.processes - other.processes, self.pss - other.pss, self.private - other.private)


def memory_of(processes: list[psutil.Process]) -> Memory:
    """Add up processes."""
    pss = private = 0
    for process in processes:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Pss":
                pss += int(value.split()[0]) * 1024
            elif name in ("Private_Clean", "Private_Dirty"):
                private += int(value.split()[0]) * 1024
    return Memory(len(processes), pss, private)


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    progress.expect(5 + COUNT)
    progress.step("the model")
    model = servers.make_models(options)["tiny-a"]
    cold = measure_cold(options, model, progress)
    warm, fourfold = measure_warm(options, model, progress)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    added = fourfold.pss - (warm[-1] - warm[-2]).pss
    touched = min(1.0, max(0.0, added / (3 * servers.KV_CACHE_BYTES)))
    return report(cold, warm, weights, touched)


def measure_cold(options: Options, model: Path, progress: Progress) -> list[Memory]:
    """Separately started servers: one, then two."""
    totals = []
    with ExitStack() as stack:
        started: list[servers.ColdServer] = []
        for word in ("a cold server", "a second cold server"):
            progress.step(word)
            server = stack.enter_context(servers.ColdServer(options, model))
            client.first_answer(server.url, str(model), servers.START_SECONDS, server.alive)
            started.append(server)
            time.sleep(SETTLE_SECONDS)
            totals.append(memory_of([process for one in started for process in servers.tree(one.pid)]))
    return totals


def measure_warm(options: Options, model: Path, progress: Progress) -> tuple[list[Memory], Memory]:
    """The zygote, its spare and 0 to `COUNT` instances; and what one with a fourfold KV cache adds."""
    progress.step("Bullpen imports vLLM")
    with servers.Daemon(options, "vllm") as daemon:
        daemon.wait_warm()
        totals = [measure_family(daemon)]
        for number in range(1, COUNT + 1):
            progress.step(f"instance {number}")
            add_instance(daemon, model, servers.KV_CACHE_BYTES)
            totals.append(measure_family(daemon))
        progress.step("an instance with four times the KV cache")
        add_instance(daemon, model, 4 * servers.KV_CACHE_BYTES)
        return totals, measure_family(daemon) - totals[-1]


def add_instance(daemon: servers.Daemon, model: Path, kv_cache: int) -> None:
    """Start an instance and have it answer."""
    document = daemon.create(" ".join(servers.vllm_arguments(model, 0, kv_cache)))
    daemon.wait_ready(document["instance_id"])
    client.complete(document["url"], str(model))


def measure_family(daemon: servers.Daemon) -> Memory:
    """The zygote with all that descends from it, once its next spare is there."""
    client.wait_until(lambda: len(daemon.spares()) == 1, 10, "the next spare")
    time.sleep(SETTLE_SECONDS)
    return memory_of(servers.tree(daemon.zygote().pid))


def report(cold: list[Memory], warm: list[Memory], weights: int, touched: float) -> Result:
    """The tables and what was to be reached."""
    excluded = weights + touched * servers.KV_CACHE_BYTES
    further_cold, further_warm = cold[1] - cold[0], warm[-1] - warm[-2]
    rows = [
        row("a cold server", cold[0], cold[0], excluded),
        row("a second one", cold[1], further_cold, excluded),
        ["Bullpen: zygote and spare", str(warm[0].processes), mib(warm[0].pss), "", "", ""],
    ]
    rows += [
        row(f"instance {number} of Bullpen", warm[number], warm[number] - warm[number - 1], excluded)
        for number in range(1, len(warm))
    ]
    ours, theirs = further_warm.pss - excluded, further_cold.pss - excluded
    columns = ["", "processes", "PSS in total", "added: PSS", "added: private", "added without weights and KV cache"]
    method = METHOD.format(count=COUNT, weights=mib(weights), touched=touched)
    even = break_even(cold, warm)
    note = (
        "Private memory falls where the newcomer shares pages that one process had to itself."
        f" With its zygote and spare counted, Bullpen needs less in total from {so_many(even, 'server')} on."
    )
    return Result(
        TITLE,
        method,
        tables=[Table("Memory of process trees", columns, rows, note)],
        goals=[
            Goal(
                "A further instance, as a part of a further cold server",
                f"≤ 1/{LIMIT}",
                ratio(ours, theirs),
                ours * LIMIT <= theirs,
            )
        ],
        data={
            "cold": [asdict(one) for one in cold],
            "warm": [asdict(one) for one in warm],
            "weights": weights,
            "kv_cache_touched": touched,
        },
    )


def row(what: str, total: Memory, added: Memory, excluded: float) -> list[str]:
    """One line of the table."""
    return [what, str(total.processes), mib(total.pss), mib(added.pss), mib(added.private), mib(added.pss - excluded)]


def so_many(number: int, what: str) -> str:
    """So many of something, in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def break_even(cold: list[Memory], warm: list[Memory]) -> int:
    """From how many servers on Bullpen with all its own needs less than servers started separately."""
    further_cold, further_warm = cold[1].pss - cold[0].pss, warm[-1].pss - warm[-2].pss
    count = 1
    while warm[0].pss + count * further_warm > cold[0].pss + (count - 1) * further_cold and count < 100:
        count += 1
    return count
