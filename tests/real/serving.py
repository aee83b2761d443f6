"""Real vLLM servers as the tests see them: their options, their life, their answers."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import command_lines, processes_of, session_of

ENDED = ("stopped", "failed")
GONE_SECONDS = 10.0


@dataclass(frozen=True)
class Models:
    """Folders of models, and the options with which each machine can run them.

    Attributes:
        folder: where they are.
        tiny: options of a tiny language model, the same for each.
    """

    folder: Path
    tiny: tuple[str, ...]

    def options(self, name: str, *more: str) -> str:
        """The command line that serves one of them under its own name."""
        return shlex.join([str(self.folder / name), "--served-model-name", name, *self.tiny, *more])


@contextmanager
def serving(daemon: Daemon, options: str, instance_id: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """An instance that is ready; it is deleted afterwards, and nothing of it is left."""
    pid = daemon.create(options, instance_id=instance_id, **fields)["pid"]
    try:
        yield wait_ready(daemon, instance_id)
    finally:
        daemon.http.delete(f"/v2/vllm/instances/{instance_id}")
        assert not processes_of(instance_id, pid)


def wait_ready(daemon: Daemon, instance_id: str) -> dict[str, Any]:
    """Wait until an instance is ready; where it fails instead, its log is told."""
    document = daemon.wait_state(instance_id, "ready", *ENDED)
    assert document["state"] == "ready", f"{document}\n{daemon.log(instance_id)[-4000:]}"
    return document


def wait_gone(instance_id: str, pid: int) -> None:
    """Wait until no process of an instance is left."""
    wait_until(lambda: not processes_of(instance_id, pid), GONE_SECONDS, lambda: str(processes_of(instance_id, pid)))


def engine_core(pid: int) -> int:
    """The engine core's process, in the session that an instance's server leads."""
    found = [
        other for other, line in command_lines().items() if line.startswith("VLLM::Engine") and session_of(other) == pid
    ]
    assert len(found) == 1, found
    return found[0]


def complete(instance: dict[str, Any], prompt: str = "the model", tokens: int = 8, **more: Any) -> str:
    """A greedy completion of an instance: the same each time."""
    body = {
        "model": instance["served_model_names"][0],
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }
    reply = httpx.post(f"{instance['url']}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    return str(choice["text"])


@contextmanager
def open_stream(instance: dict[str, Any], tokens: int) -> Iterator[Iterator[str]]:
    """A streamed completion that is under way: its first line has come."""
    body = {
        "model": instance["served_model_names"][0],
        "prompt": "the model",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{instance['url']}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def drain(lines: Iterator[str]) -> list[str]:
    """What still comes of a stream until it ends or breaks off."""
    received = []
    try:
        for line in lines:
            received.append(line)
    except httpx.TransportError:
        received.append("broken off")
    return received


@dataclass
class Asker:
    """Asks an instance for completions without a pause, in a thread, and keeps the answers and what went wrong."""

    instance: dict[str, Any]
    answers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __enter__(self) -> Asker:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(complete(self.instance))
            except (httpx.HTTPError, AssertionError) as problem:
                self.problems.append(f"after {len(self.answers)} answers: {problem!r}")
            time.sleep(0.01)

    def wait_for_more(self, count: int = 5) -> None:
        """Wait for so many further answers."""
        enough = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= enough or bool(self.problems), 30.0)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
