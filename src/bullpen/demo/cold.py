"""One cold start of vLLM's own server, for comparison."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from bullpen.demo import chat, processes
from bullpen.demo.checks import deadline, expect
from bullpen.demo.models import Engine, environment
from bullpen.engines.phases import PhaseReader

START_SECONDS = 900.0
"""A first start reads gigabytes of libraries from disk."""
STOP_SECONDS = 15.0
ORPHAN_SECONDS = 3.0
KILL_SECONDS = 10.0
PAUSE = 0.05
"""Between two looks; at most this much is added to what is measured."""


@dataclass(frozen=True)
class Cold:
    """A cold start.

    Attributes:
        ready: seconds from the start of the program to ``/health``.
        first_token: seconds from there to the end of a one-token chat completion.
        memory: what its processes take together, in bytes.
        processes: how many they are.
    """

    ready: float
    first_token: float
    memory: int
    processes: int


def measure(engine: Engine, model: Path, work: Path, show: Callable[[str, float], None]) -> Cold:
    """Start ``vllm serve`` once, ask it for a token, and stop it.

    Args:
        engine: whose server.
        model: what it serves.
        work: a folder for its log.
        show: told the phase and the progress, 0 to 1, again and again.

    Raises:
        DemoError: it does not start, answer or stop.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [engine.python, "-m", "vllm.entrypoints.cli.main", "serve", *engine.options(model)]
    log = work / "cold.log"
    begun = time.monotonic()
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )
    try:
        wait_until_ready(server, url, log, show)
        ready = time.monotonic() - begun
        chat.ask(url, model.name, tokens=1)
        first_token = time.monotonic() - begun
        tree = processes.read_tree(server.pid)
        stop(server)
    finally:
        # An engine core that is left behind would live on, and keep the port.
        gone = processes.kill_sessions({server.pid}, KILL_SECONDS)
    expect(gone, "processes of the cold server outlive SIGKILL; `ps -ef` shows them")
    return Cold(ready, first_token, processes.total_pss(tree), len(tree))


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, show: Callable[[str, float], None]) -> None:
    """Wait for ``/health``, telling the phases from the log.

    Raises:
        DemoError: the server ends, or takes too long; the text holds the log's last line.
    """
    reader = PhaseReader()
    with log.open("rb") as lines, deadline(START_SECONDS, "the start of vLLM's own server"):
        while not answers(url):
            reader.feed(lines.read())
            show(str(reader.phase or "imports"), reader.progress)
            code = server.poll()
            expect(code is None, f"vLLM's own server ended with status {code}; its log ends:\n{tail(log)}")
            time.sleep(PAUSE)


def answers(url: str) -> bool:
    """Whether a server is ready."""
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """Let the server end in order, for some time."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    processes.wait_until_gone({server.pid}, ORPHAN_SECONDS)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
