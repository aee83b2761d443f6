"""The demo: real vLLM started cold once and warm twice, with everything around it shown and checked.

The story, in order: two tiny models; one cold start for comparison; the daemon; an instance of each model; a chat
completion of each; the processes, the memory, the log; the end of everything. Each step checks what it shows.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from bullpen.demo import chat, cold, models
from bullpen.demo.chat import Answer
from bullpen.demo.checks import expect
from bullpen.demo.cold import Cold
from bullpen.demo.daemon import Daemon, Started
from bullpen.demo.models import Engine
from bullpen.demo.processes import Process, total_pss
from bullpen.demo.report import Report, duration
from bullpen.errors import BullpenError
from bullpen.node import settings

INTERRUPTED = 130
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Findings:
    """What was measured and seen; filled as the story goes."""

    engine: Engine | None = None
    cold: Cold | None = None
    answers_after: float = 0.0
    warm_after: float = 0.0
    started: list[Started] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    tree: list[Process] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes that daemon, zygote and instances take: with no instance, with one, with two."""

    @property
    def further(self) -> int:
        """Bytes that the last instance added."""
        return self.memory[-1] - self.memory[-2]

    def document(self) -> dict[str, Any]:
        """As JSON data; times in seconds, memory in bytes."""
        assert self.engine is not None and self.cold is not None
        return {
            "ok": True,
            "vllm": self.engine.version,
            "cold": asdict(self.cold),
            "daemon": {"answers_after": self.answers_after, "warm_after": self.warm_after},
            "warm": [
                {
                    "created": one.created,
                    "ready": one.ready,
                    "first_token": one.first_token,
                    "instance": one.instance.document,
                }
                for one in self.started
            ],
            "ratios": [self.cold.first_token / one.first_token for one in self.started],
            "answers": {name: asdict(answer) for name, answer in self.answers.items()},
            "processes": [asdict(process) for process in self.tree],
            "memory": {"without_instances": self.memory[0], "further_instance": self.further},
        }


def run(*, cache: Path | None, keep: bool, json_output: bool) -> int:
    """Show real vLLM started cold and warm.

    Args:
        cache: where the two models are kept; a folder in the user's cache where None.
        keep: leave the daemon's state directory, with its output and the cold server's log.
        json_output: print one document with the figures instead of the story.

    Returns:
        The exit code: 0 if every step was right, 1 if one was not, 130 at Ctrl-C or SIGTERM.
    """
    report = Report(json_output)
    try:
        with interruptible():
            findings = play(report, models.cache_folder(cache), keep)
    except BullpenError as problem:
        report.failed(str(problem))
        if json_output:
            print(json.dumps({"ok": False, "error": str(problem)}))
        return 1
    except KeyboardInterrupt:
        report.failed("interrupted; everything that was started has been stopped")
        return INTERRUPTED
    if json_output:
        print(json.dumps(findings.document(), indent=2))
    return 0


def play(report: Report, cache: Path, keep: bool) -> Findings:
    """The whole story.

    Raises:
        DemoError: a step went wrong. Nothing runs any more.
    """
    findings = Findings()
    findings.engine = engine = models.find_engine(settings.load({}).engine_python)
    report.title(engine)
    with report.live("models", "making two tiny Llamas"):
        begun = time.monotonic()
        paths = models.make_models(engine, cache)
    report.done("models", f"{' and '.join(path.name for path in paths)} in {cache}", time.monotonic() - begun)
    work = Path(tempfile.mkdtemp(prefix="bullpen-demo-"))
    try:
        findings.cold = compare(report, engine, paths[0], work)
        with Daemon(engine, work) as daemon:
            warm(report, daemon, findings)
            for path in paths:
                start(report, daemon, shlex.join(engine.options(path)), path.name, findings)
            talk(report, findings)
            look(report, daemon, findings)
            end(report, daemon, findings.started)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    report.summary(findings.cold, findings.started, findings.further)
    steps = next_steps(bullpen_command(), engine, paths[0])
    report.next_steps([*steps, (f"ls {shlex.quote(str(work))}", "the logs")] if keep else steps)
    return findings


def next_steps(bullpen: str, engine: Engine, model: Path) -> list[tuple[str, str]]:
    """Commands to go on with, each with what it is for; they work as they stand.

    Args:
        bullpen: how the shell finds the command line.
        engine: the vLLM that was shown.
        model: one of the demo's.
    """
    folder, *options = engine.options(model)
    return [
        (f"{bullpen} serve", "start the daemon, in a terminal of its own; http://127.0.0.1:8001/docs has its API"),
        (
            f"{bullpen} run {shlex.join([folder, '--', *options])}",
            "then, in another terminal, the demo's model with the demo's options; put a model of yours in its place\n"
            "without --enforce-eager vLLM compiles a model first, which a warm parent does not save",
        ),
        (f"{bullpen} ps", "see what runs; `logs ID` shows its log, `stop ID` ends it"),
        (f"{bullpen} doctor", "what is installed here, and what to fix"),
        ("make bench", "in Bullpen's source tree: medians of several runs, where this demo measured once"),
    ]


def bullpen_command() -> str:
    """How a shell here runs this very Bullpen's command line."""
    if shutil.which("bullpen"):
        return "bullpen"
    script = Path(sys.executable).with_name("bullpen")
    return shlex.quote(str(script)) if script.exists() else f"{shlex.quote(sys.executable)} -m bullpen"


def compare(report: Report, engine: Engine, model: Path, work: Path) -> Cold:
    """Start vLLM's own server once."""
    with report.live("cold", f"vllm serve {model.name}") as show:
        measured = cold.measure(engine, model, work, show)
    text = f"vllm serve {model.name}, {measured.processes} processes, to its first token"
    report.done("cold", text, measured.first_token)
    return measured


def warm(report: Report, daemon: Daemon, findings: Findings) -> None:
    """See the daemon answer at once, and import the engine once."""
    with report.live("daemon", "importing vLLM once") as show:
        findings.answers_after = daemon.wait_until_it_answers()
        findings.warm_after = daemon.wait_until_warm(show)
    text = f"answers after {duration(findings.answers_after)}, has imported vLLM after"
    report.done("daemon", text, findings.warm_after)
    findings.memory.append(total_pss(daemon.tree()))


def start(report: Report, daemon: Daemon, options: str, name: str, findings: Findings) -> None:
    """Create one instance and see it answer."""
    with report.live(name, "PUT /v2/vllm/instances") as show:
        started = daemon.start(name, options, show)
    findings.started.append(started)
    findings.memory.append(total_pss(daemon.tree()))
    report.started(started)


def talk(report: Report, findings: Findings) -> None:
    """Ask each model; the last one's answer is streamed."""
    *plain, streamed = findings.started
    for one in plain:
        answer = findings.answers[one.name] = chat.ask(one.url, one.name)
        report.answer(one.name, answer)
    with report.streaming(streamed.name) as show:
        findings.answers[streamed.name] = chat.stream(streamed.url, streamed.name, show)
    texts = {answer.text for answer in findings.answers.values()}
    expect(len(texts) == len(findings.answers), "two models with different weights gave the same answer")


def look(report: Report, daemon: Daemon, findings: Findings) -> None:
    """Show processes, memory and the end of a log."""
    findings.tree = daemon.tree()
    pids = {process.pid for process in findings.tree}
    for one in findings.started:
        expect(one.instance.pid in pids, f"{one.name}'s process {one.instance.pid} is not below the daemon")
    expect(findings.further > 0, "a further instance took no memory, so something was not measured")
    report.processes(findings.tree)
    name = findings.started[-1].name
    text = daemon.log(name)
    expect(f'"POST {chat.PATH} HTTP/1.1" 200' in text, f"{name}'s log does not show the request that it answered")
    report.log(name, text)


def end(report: Report, daemon: Daemon, started: Sequence[Started]) -> None:
    """Stop everything, and look whether it has."""
    report.gap()
    for one in started:
        report.done(one.name, "deleted over REST; no process of it is left", daemon.delete(one))
    report.done("daemon", "ended by SIGTERM; a scan of /proc finds nothing left of it", daemon.end())


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does: in order, with everything stopped."""
    heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Once: what is being stopped shall not be left half stopped by a second, impatient one.
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
