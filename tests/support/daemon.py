"""A daemon as a real process, for tests that talk to it over HTTP."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

READY_SECONDS = 30.0
END_SECONDS = 40.0


class Daemon:
    """`python -m bullpen.launcher` on a free port, in a state directory of its own.

    Args:
        state_dir: its state directory.
        engine: the engine of instances that name none.
        environment: variables on top of this process's.
        command: another command line, for other ways to start the same service.
        **settings: settings by name, as ``stop_timeout=1``.
    """

    def __init__(
        self,
        state_dir: Path,
        engine: str = "sim",
        environment: dict[str, str] | None = None,
        command: list[str] | None = None,
        **settings: Any,
    ) -> None:
        values = {
            "port": 0,
            "grpc_port": 0,  # few tests need it; None in `settings` turns it on, at the port after the other one
            "host": "127.0.0.1",
            "stop_timeout": 5,
            **settings,
            "engine": engine,
            "state_dir": state_dir,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BULLPEN_")}
        variables = {f"BULLPEN_{name.upper()}": str(value) for name, value in values.items() if value is not None}
        self.state_dir = state_dir
        self.lines: queue.Queue[str] = queue.Queue()
        self.output: list[str] = []
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "bullpen.launcher"],
            env={**inherited, **variables, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        self._http: httpx.Client | None = None

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            self.lines.put(line)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.process.pid

    @property
    def http(self) -> httpx.Client:
        """A client of the daemon."""
        if self._http is None:
            self._http = httpx.Client(base_url=self.url, timeout=60.0)
        return self._http

    def wait_line(self, text: str, seconds: float = READY_SECONDS) -> str:
        """The next line of output that contains a text."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() < deadline and self.process.poll() is None:
                    continue
                raise AssertionError(f"no line with {text!r} in:\n{''.join(self.output)}") from None
            if text in line:
                return line

    def wait_ready(self) -> Daemon:
        """Wait until the API answers."""
        self.url = self.wait_line("bullpen: ready on ").split()[-1]
        return self

    def wait_grpc(self) -> str:
        """Wait until gRPC answers; its address."""
        return self.wait_line("bullpen: gRPC ready on ").split()[-1]

    def wait_warm(self, seconds: float = 120.0) -> Daemon:
        """Wait until instances can be forked."""
        wait_until(lambda: self.http.get("/ready").status_code == 200, seconds)
        return self

    def create(self, options: str = "--model m", **fields: Any) -> dict[str, Any]:
        """Create an instance; it must succeed."""
        name = fields.pop("instance_id", None)
        body = {"options": options, **fields}
        path = "/v2/vllm/instances"
        reply = self.http.put(f"{path}/{name}", json=body) if name else self.http.post(path, json=body)
        assert reply.status_code == 201, reply.text
        document: dict[str, Any] = reply.json()
        return document

    def instance(self, instance_id: str) -> dict[str, Any]:
        """Describe an instance."""
        reply = self.http.get(f"/v2/vllm/instances/{instance_id}")
        assert reply.status_code == 200, reply.text
        document: dict[str, Any] = reply.json()
        return document

    def wait_state(self, instance_id: str, *states: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until an instance is in one of the states."""
        wait_until(
            lambda: self.instance(instance_id)["state"] in states, seconds, lambda: str(self.instance(instance_id))
        )
        return self.instance(instance_id)

    def delete(self, instance_id: str) -> dict[str, Any]:
        """Delete an instance; it must succeed."""
        reply = self.http.delete(f"/v2/vllm/instances/{instance_id}")
        assert reply.status_code == 200, reply.text
        document: dict[str, Any] = reply.json()
        return document

    def log(self, instance_id: str) -> str:
        """An instance's log, the first MiB."""
        return self.http.get(f"/v2/vllm/instances/{instance_id}/log").text

    def kill(self) -> None:
        """End the daemon as a crash does; its instances live on."""
        self.process.kill()
        self.process.wait(10)
        self._close()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon by a signal and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the daemon does not end:\n{''.join(self.output)}") from None
        self._close()
        return code

    def _close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None
        self._reader.join(5)

    def __enter__(self) -> Daemon:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the daemon, and with it its instances."""
        self.end()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0, describe: Callable[[], str] | None = None) -> None:
    """Wait for a condition, looking often.

    Raises:
        AssertionError: it does not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain{': ' + describe() if describe else ''}"
        time.sleep(0.02)
