"""The programs that benchmarks start: Bullpen's daemon, vLLM's own server, and the launcher that forks after import.

Each ends with its context, its whole tree with it, by process id.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.client import answers, call, wait_until
from bench.common import BenchError, Options

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[1]
MODEL_MAKER = ROOT / "src" / "bullpen" / "demo" / "tiny_models.py"
MODEL_SEEDS = {"tiny-a": 1, "tiny-b": 2}
VLLM_OPTIONS = ["--max-model-len", "256", "--enforce-eager", "--dtype", "float32"]
KV_CACHE_BYTES = 64 * 2**20
VLLM_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

IMPORT_SECONDS = 300.0
"""How long the import of vLLM may take."""
START_SECONDS = 300.0
"""How long a cold start may take."""
END_SECONDS = 40.0


def environment(options: Options, **more: str) -> dict[str, str]:
    """This process's environment without what others have set for Bullpen or vLLM, the same for every program.

    vLLM's cache is a new one in each run; whoever starts first fills it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BULLPEN_", "VLLM_"))}
    return {**kept, **VLLM_ENVIRONMENT, "VLLM_CACHE_ROOT": str(options.folder / "vllm-cache"), **more}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def make_models(options: Options) -> dict[str, Path]:
    """Make the tiny models where they are not there yet, in the engine's interpreter; return their folders by name."""
    wanted = [f"{name}={seed}" for name, seed in MODEL_SEEDS.items()]
    if not all((options.models / name / "config.json").exists() for name in MODEL_SEEDS):
        command = [sys.executable, str(MODEL_MAKER), str(options.models), *wanted]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=IMPORT_SECONDS)
    return {name: options.models / name for name in MODEL_SEEDS}


def vllm_arguments(model: Path, port: int, kv_cache: int = KV_CACHE_BYTES) -> list[str]:
    """The same command line for every way of starting vLLM."""
    listen = ["--host", HOST, "--port", str(port)] if port else []
    return ["--model", str(model), *VLLM_OPTIONS, "--kv-cache-memory-bytes", str(kv_cache), *listen]


def own_server_command(arguments: list[str]) -> list[str]:
    """vLLM's own entry point: ``vllm serve``, or the module where that command cannot run."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    script = shutil.which("vllm", path=str(Path(sys.executable).parent))
    with suppress(importlib.metadata.PackageNotFoundError):
        # The command looks its own version up under this name; the CPU build is a distribution of another name.
        importlib.metadata.version("vllm")
        command = [script, "serve"] if script else command
    return [*command, *arguments]


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it, those that live."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_tree(processes: list[psutil.Process], grace: float = 15.0) -> None:
    """Ask the first one to end, and kill whoever is left after ``grace`` seconds."""
    if processes:
        with suppress(psutil.NoSuchProcess):
            processes[0].terminate()
        _, left = psutil.wait_procs(processes, timeout=grace)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=grace)


class Program:
    """A program of ours, running from here to the end of the context.

    Args:
        command: what to run.
        log: where its output goes.
        env: its whole environment.
        pipes: whether to talk with it over its standard input and output.
    """

    def __init__(self, command: list[str], log: Path, env: dict[str, str], pipes: bool = False) -> None:
        self.log = log
        with log.open("ab") as output:
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else output,
                stderr=output,
                env=env,
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self, seconds: float | None = None) -> str:
        """The next line of its standard output; with a deadline, where it has written no further line yet.

        Raises:
            BenchError: it has ended, or says nothing in time.
        """
        assert self.process.stdout is not None
        if seconds is not None and not select.select([self.process.stdout], [], [], seconds)[0]:
            raise BenchError(f"{self.process.args!r} said nothing for {seconds:.0f} s:\n{self.tail()}")
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.process.args!r} ended:\n{self.tail()}")
        return str(line)

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def end(self) -> None:
        """End it with all its children."""
        end_tree(tree(self.pid))
        self.process.wait(END_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.end()


class ColdServer(Program):
    """vLLM's own server, started from nothing."""

    def __init__(self, options: Options, model: Path) -> None:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        command = own_server_command(vllm_arguments(model, port))
        super().__init__(command, options.folder / f"cold-{port}.log", environment(options))


class ForkAfterImport(Program):
    """The launcher of ``fork_after_import.py``, its import behind it."""

    def __init__(self, options: Options) -> None:
        command = [sys.executable, "-m", "bench.fork_after_import"]
        super().__init__(command, options.folder / "fork-after-import.log", environment(options), pipes=True)
        try:
            self.import_seconds = float(json.loads(self.hear())["seconds"])
        except BaseException:
            self.end()
            raise

    def fork(self, model: Path) -> tuple[int, float, str]:
        """Start a server; return its process, when it was forked, and its URL."""
        port = free_port()
        log = self.log.with_name(f"forked-{port}.log")
        self.tell(json.dumps({"argv": vllm_arguments(model, port), "log": str(log)}))
        answer = json.loads(self.hear())
        return int(answer["pid"]), float(answer["at"]), f"http://{HOST}:{port}"


class Daemon(Program):
    """Bullpen's daemon on free ports.

    Args:
        options: of the run.
        engine: the engine of its instances.
        state: the state directory, for a daemon that follows another; a new one where None.
        variables: environment beside the usual.
        **settings: settings by name, as ``stop_timeout=3``.
    """

    def __init__(
        self,
        options: Options,
        engine: str,
        state: Path | None = None,
        variables: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        port, self.grpc_port = free_port(), free_port()
        self.url = f"http://{HOST}:{port}"
        self.instances = f"{self.url}/v2/vllm/instances"
        self.state = state or options.folder / f"state-{port}"
        self._pids: set[int] = set()
        ports = {"host": HOST, "port": port, "grpc_port": self.grpc_port}
        values = {**ports, "engine": engine, "state_dir": self.state, "stop_timeout": 10, **settings}
        own = {f"BULLPEN_{name.upper()}": str(value) for name, value in values.items()}
        command = [sys.executable, "-m", "bullpen.launcher"]
        super().__init__(
            command, options.folder / f"daemon-{port}.log", environment(options, **own, **(variables or {}))
        )

    def wait_answering(self) -> float:
        """Wait for the first answer to ``/health``; return when it came."""
        return wait_until(lambda: answers(f"{self.url}/health") or self._ended(), 60, "the daemon")

    def wait_warm(self) -> Self:
        """Wait until instances can be forked, and a spare waits."""
        wait_until(lambda: answers(f"{self.url}/ready") or self._ended(), IMPORT_SECONDS, "the zygote to be warm")
        wait_until(lambda: bool(self.spares()), 10, "a spare")
        return self

    def wait_grpc(self) -> None:
        """Wait until it serves gRPC, which it begins to do when the REST API answers."""
        wait_until(
            lambda: f"gRPC ready on {HOST}:{self.grpc_port}" in self.log.read_text() or self._ended(), 30, "gRPC"
        )

    def _ended(self) -> bool:
        if not self.alive():
            raise BenchError(f"the daemon ended:\n{self.tail()}")
        return False

    def zygote(self) -> psutil.Process:
        """The zygote of its engine."""
        (pid,) = [zygote["pid"] for zygote in call("GET", f"{self.url}/ready")["zygotes"]]
        return psutil.Process(pid)

    def spares(self) -> list[int]:
        """Processes of the zygote that are no instance."""
        servers = {instance["pid"] for instance in self.list()}
        return [child.pid for child in self.zygote().children() if child.pid not in servers]

    def create(self, options: str = "--model m", **fields: Any) -> dict[str, Any]:
        """Create an instance."""
        document: dict[str, Any] = call("POST", self.instances, {"options": options, **fields})
        self._pids.add(document["pid"])
        return document

    def instance(self, instance_id: str) -> dict[str, Any]:
        """Describe an instance."""
        document: dict[str, Any] = call("GET", f"{self.instances}/{instance_id}")
        return document

    def list(self) -> list[dict[str, Any]]:
        """Describe all instances."""
        documents: list[dict[str, Any]] = call("GET", self.instances)["instances"]
        return documents

    def wait_ready(self, instance_id: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until the daemon says that an instance is ready."""
        wait_until(lambda: self.instance(instance_id)["state"] != "starting", seconds, f"instance {instance_id}")
        document = self.instance(instance_id)
        if document["state"] != "ready":
            raise BenchError(f"instance {instance_id} is {document['state']}: {document.get('error')}")
        return document

    def swap(self, incoming: str, outgoing: str) -> dict[str, Any]:
        """Swap two instances; return the reply, which comes when the incoming one is ready."""
        body = {"in": incoming, "out": outgoing}
        document: dict[str, Any] = call("POST", f"{self.url}/v2/vllm/swap", body, timeout=START_SECONDS)
        return document

    def delete(self, instance_id: str) -> None:
        """Delete an instance."""
        call("DELETE", f"{self.instances}/{instance_id}")

    def crash(self) -> None:
        """End the daemon alone, as a crash does; the next one takes over its instances."""
        self.process.kill()
        self.process.wait(END_SECONDS)

    def successor(self, options: Options, engine: str) -> Daemon:
        """The next daemon on the same state directory, responsible for the same instances."""
        following = Daemon(options, engine, self.state)
        following._pids |= self._pids
        return following

    def end(self) -> None:
        """End the daemon, and its instances, those too that it should have ended and has not."""
        left = [process for pid in self._pids for process in tree(pid)]
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        super().end()
        end_tree([process for process in left if process.is_running()], grace=1.0)
