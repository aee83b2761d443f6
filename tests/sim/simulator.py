"""A simulator run as a process of its own, for tests that speak to it over real HTTP."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx

import bullpen

SOURCE = str(Path(bullpen.__file__).parents[1])
DEADLINE_SECONDS = 20.0

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None]) -> T:
    """Call `probe` until it returns something true; fail when that takes too long."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := probe()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


class Simulator:
    """Starts `python -m bullpen.sim` on a port of the kernel's choice; leaves no process behind.

    A name of `environment` in capitals is a variable's own; others are vLLM's (`vllm_...`) or the simulator's.
    """

    def __init__(self, directory: Path, *arguments: str, **environment: object) -> None:
        names = {_variable(name): name for name in environment}
        self.log_path = directory / f"sim-{len(list(directory.iterdir()))}.log"
        foreign = ("BULLPEN_", "VLLM_", "CUDA_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bullpen.sim", *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**inherited, "PYTHONPATH": SOURCE}
                | {variable: str(environment[name]) for variable, name in names.items()},
            )
        self._client: httpx.Client | None = None

    @classmethod
    def serving(cls, directory: Path, *arguments: str, **environment: object) -> "Simulator":
        """Start one and wait until it serves."""
        defaults = {"start_seconds": 0, "vllm_server_dev_mode": 1}
        simulator = cls(
            directory,
            "--model",
            "test/model",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            *arguments,
            **defaults | environment,
        )
        simulator.wait_serving()
        return simulator

    def wait_serving(self) -> None:
        """Wait for the log line that says that the port answers."""

        def probe() -> bool:
            assert self.process.poll() is None, self.log
            return "Application startup complete." in self.log

        wait_for("the simulator serves", probe)

    @property
    def log(self) -> str:
        """What has been written so far."""
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        """Where it listens, by its log."""
        match = re.search(r"Starting vLLM server on (http://\S+)", self.log)
        assert match, self.log
        return match[1]

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.url.rpartition(":")[2])

    @property
    def engine_pid(self) -> int:
        """The process of the engine child, by its log."""
        match = wait_for("the engine child logs", lambda: re.search(r"\(EngineCore pid=(\d+)\)", self.log))
        return int(match[1])

    @property
    def http(self) -> httpx.Client:
        """A client of this simulator."""
        if self._client is None:
            self._client = httpx.Client(base_url=self.url, timeout=DEADLINE_SECONDS, trust_env=False)
        return self._client

    def ask(self, prompt: object = "x", **fields: object) -> httpx.Response:
        """Ask for a completion over a connection of its own, as threads may."""
        body = {"prompt": prompt, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=DEADLINE_SECONDS, trust_env=False)

    def complete(self, prompt: object = "hello", **fields: object) -> dict[str, object]:
        """A completion's JSON."""
        answer = self.http.post("/v1/completions", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert isinstance(content, dict)
        return content

    def metric(self, name: str, **labels: str) -> float:
        """The value of the one sample of this name that has these labels."""
        found = [
            float(line.rpartition(" ")[2])
            for line in self.http.get("/metrics").text.splitlines()
            if line.startswith(f"{name}{{") and all(f'{label}="{value}"' in line for label, value in labels.items())
        ]
        assert len(found) == 1, found
        return found[0]

    def wait_ended(self) -> int:
        """Wait until the server process ends; its exit code."""
        return self.process.wait(DEADLINE_SECONDS)

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client:
            self._client.close()
        # First the server: its end lets an ordinary engine child end too. A stubborn one is known by its log.
        pids = {int(pid) for pid in re.findall(r"\(EngineCore pid=(\d+)\)", self.log)}
        self.process.kill()
        self.process.wait(DEADLINE_SECONDS)
        for pid in filter(_is_ours, pids):
            os.kill(pid, signal.SIGKILL)
            wait_for("the engine child is gone", partial(_is_dead, pid))


def _variable(name: str) -> str:
    if name.isupper():
        return name
    return name.upper() if name.startswith("vllm_") else f"BULLPEN_SIM_{name.upper()}"


def _is_dead(pid: int) -> bool:
    return not is_alive(pid)


def _is_ours(pid: int) -> bool:
    """Whether a pid is a simulator's and not some later process's."""
    try:
        return b"bullpen.sim" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
