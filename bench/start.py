"""``start``: from asking for a server to the first piece of its first completion, three ways, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from bench import client, servers
from bench.common import Goal, Options, Progress, Result, Table, median, ratio, spread

TITLE = "Start: from the request to the first token"
METHOD = """\
The same tiny Llama (two layers, random weights), the same prompt and the same options
(`{options}`).
Three ways to start vLLM, one after the other in each round and never two at a time:

- **cold**: `vllm serve`, timed from the start of the process;
- **fork after import**: a parent has vLLM imported and forks the server with `multiprocessing`; vLLM's own defaults
  from there on (`bench/fork_after_import.py`). Timed from the fork: the launcher's own REST call is not counted;
- **Bullpen**: `POST /v2/vllm/instances`, timed from sending the request.

Each is timed to the first piece of a streamed completion, by a client that tries again every {poll:.0f} ms. All files
are in the page cache, and vLLM's cache of model facts is filled by one start of Bullpen's, shown apart as the *first*
one. Between two starts of Bullpen's there is a second for the next spare to be forked."""

COLD_LIMIT, FORK_LIMIT = 30, 20
"""How many times faster Bullpen must be than a cold start, and than the fork after import."""
SPARE_SECONDS = 1.0
PHASES = {
    "post": "HTTP, reading the request",
    "created": "lease, check of the options, port, journal",
    "start": "to vLLM's first line: environment, arguments",
    "configuration": "configuration, engine core's process, worker",
    "download": "looking for the files",
    "weights": "weights",
    "compilation": "compilation",
    "kv_cache": "KV cache",
    "warmup": "warm-up",
    "tokenizer": "API server: tokenizer, templates, routes",
    "bind": "listening, first completion",
}
"""What each phase is about, by the name of what begins it; the first two are the daemon's own."""


@dataclass
class Warm:
    """One start by Bullpen, in seconds since the request was sent; ``phases`` by when they began."""

    first_token: float
    reply: float
    ready: float
    how: str
    phases: dict[str, float]
    text: str


def run(options: Options, progress: Progress) -> Result:
    """Measure."""
    rounds, warm_a_round = (1, 3) if options.quick else (5, 2)
    progress.expect(4 + rounds * (2 + warm_a_round))
    progress.step("the model")
    model = servers.make_models(options)["tiny-a"]
    with ExitStack() as stack:
        progress.step("Bullpen imports vLLM")
        daemon = stack.enter_context(servers.Daemon(options, "vllm")).wait_warm()
        progress.step("the fork-after-import launcher imports vLLM")
        launcher = stack.enter_context(servers.ForkAfterImport(options))
        progress.step("Bullpen's first start, to fill vLLM's cache")
        first = start_warm(daemon, model)
        cold, forked, warm = [], [], []
        texts = {first.text}
        for number in range(1, rounds + 1):
            progress.step(f"round {number} of {rounds}: cold")
            seconds, text = start_cold(options, model)
            cold.append(seconds)
            texts.add(text)
            progress.step(f"round {number} of {rounds}: fork after import")
            seconds, text = start_forked(launcher, model)
            forked.append(seconds)
            texts.add(text)
            for _ in range(warm_a_round):
                progress.step(f"round {number} of {rounds}: Bullpen")
                time.sleep(SPARE_SECONDS)
                warm.append(start_warm(daemon, model))
                texts.add(warm[-1].text)
    return report(cold, forked, warm, first, len(texts) == 1)


def start_cold(options: Options, model: Path) -> tuple[float, str]:
    """Seconds of one cold start, and what the server said."""
    with servers.ColdServer(options, model) as server:
        answer = client.first_answer(server.url, str(model), servers.START_SECONDS, server.alive)
        return answer.at - server.started, answer.text


def start_forked(launcher: servers.ForkAfterImport, model: Path) -> tuple[float, str]:
    """Seconds of one start by the fork-after-import launcher, and what the server said."""
    pid, begun, url = launcher.fork(model)
    try:
        answer = client.first_answer(url, str(model), servers.START_SECONDS, lambda: bool(servers.tree(pid)))
        return answer.at - begun, answer.text
    finally:
        servers.end_tree(servers.tree(pid))


def start_warm(daemon: servers.Daemon, model: Path) -> Warm:
    """One start by Bullpen."""
    options = " ".join(servers.vllm_arguments(model, port=0))
    sent_at, sent = time.time(), time.monotonic()
    document = daemon.create(options)
    replied = time.monotonic()
    instance_id = document["instance_id"]

    def alive() -> bool:
        return bool(daemon.instance(instance_id)["status"] == "running")

    answer = client.first_answer(document["url"], str(model), servers.START_SECONDS, alive)
    document = daemon.wait_ready(instance_id)
    daemon.delete(instance_id)
    ready = seconds_since(sent_at, document["ready_at"])
    begun = ready - document["phases"]["ready"]
    phases = {"post": 0.0, "created": seconds_since(sent_at, document["created_at"])}
    phases |= {name: begun + at for name, at in document["phases"].items() if name != "ready"}
    return Warm(answer.at - sent, replied - sent, ready, document["start"], phases, answer.text)


def seconds_since(moment: float, timestamp: str) -> float:
    """How long after ``moment`` (seconds since the epoch) a timestamp of the daemon lies; it counts milliseconds."""
    return max(0.0, datetime.fromisoformat(timestamp).timestamp() - moment)


def report(cold: list[float], forked: list[float], warm: list[Warm], first: Warm, same_text: bool) -> Result:
    """The tables and what was to be reached."""
    ours = [one.first_token for one in warm]
    rows = [
        ["cold: `vllm serve`", str(len(cold)), spread(cold), "1"],
        ["fork after import", str(len(forked)), spread(forked), ratio(median(forked), median(cold))],
        ["**Bullpen**", str(len(ours)), spread(ours), ratio(median(ours), median(cold))],
    ]
    said = "All gave the same completion." if same_text else "**The completions differ.**"
    how = ", ".join(
        f"{sum(one.how == word for one in warm)} from a {word}" for word in sorted({one.how for one in warm})
    )
    alone = f"Its first start of all, with vLLM's cache empty: {spread([first.first_token])}."
    note = f"{said} Bullpen's processes: {how}. {alone}"
    columns = ["", "runs", "median (min to max)", "share of cold"]
    method = METHOD.format(
        options=" ".join([*servers.VLLM_OPTIONS, "--kv-cache-memory-bytes", str(servers.KV_CACHE_BYTES)]),
        poll=client.POLL_SECONDS * 1000,
    )
    return Result(
        TITLE,
        method,
        tables=[Table("To the first token", columns, rows, note), phase_table(warm), daemon_table(warm)],
        goals=[
            goal("a cold start", ours, cold, COLD_LIMIT),
            goal("the fork after import", ours, forked, FORK_LIMIT),
            Goal("The same completion from all three", "the same", "the same" if same_text else "different", same_text),
        ],
        data={"cold": cold, "forked": forked, "warm": [asdict(one) for one in warm], "first": asdict(first)},
    )


def goal(than: str, ours: list[float], theirs: list[float], times: int) -> Goal:
    """Bullpen's median is at most a given part of another's."""
    part = ratio(median(ours), median(theirs))
    return Goal(f"Bullpen's median, as a part of {than}", f"≤ 1/{times}", part, median(ours) * times <= median(theirs))


def phase_table(warm: list[Warm]) -> Table:
    """What a warm start is spent on, by what the daemon saw in the log."""
    names = [name for name in PHASES if any(name in one.phases for one in warm)]
    begun: dict[str, list[float]] = {name: [] for name in names}
    took: dict[str, list[float]] = {name: [] for name in names}
    for one in warm:
        order = sorted(one.phases.items(), key=lambda phase: phase[1])
        ends = [at for _, at in order[1:]] + [max(one.first_token, order[-1][1])]
        for (name, at), end in zip(order, ends, strict=True):
            begun[name].append(at)
            took[name].append(end - at)
    rows = [[PHASES[name], spread(begun[name], "ms"), spread(took[name], "ms")] for name in names]
    note = (
        "As the daemon sees them: it reads the log every 15 ms, so that a phase may seem to begin that much later, and"
        " short ones fall together."
    )
    return Table("Bullpen's phases", ["phase", "begins, after the request", "takes"], rows, note)


def daemon_table(warm: list[Warm]) -> Table:
    """What Bullpen adds to vLLM's own start."""
    figures: list[tuple[str, Callable[[Warm], float]]] = [
        ("request read and understood", lambda one: one.phases["created"]),
        ("the process is told to become the server", lambda one: one.phases["start"]),
        ("reply to the POST (the server is starting meanwhile)", lambda one: one.reply),
        ("the daemon has seen that it is ready", lambda one: one.ready),
        ("the client has its first token", lambda one: one.first_token),
    ]
    rows = [[what, spread([figure(one) for one in warm], "ms")] for what, figure in figures]
    return Table("The daemon's part", ["", "after the request"], rows)
