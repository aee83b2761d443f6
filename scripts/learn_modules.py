"""Learn which modules a vLLM server imports while it starts, for the zygote to import ahead.

    .venv/bin/python scripts/learn_modules.py MODEL [vllm options] > src/bullpen/zygote/worlds/vllm_modules/0.32.txt

Starts one server from a parent that has imported vLLM's entry alone, compares the modules of its processes with the
parent's when it answers, and prints a short list: names that bring the others along.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from bullpen.zygote.preload import PreloadReport
from bullpen.zygote.worlds import vllm as vllm_world

START_SECONDS = 180.0
FIRST = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.model_executor.models.llama",
    "vllm.entrypoints.openai.chat_completion.api_router",
)
"""Modules near the top of vLLM's own tree: with these first, the rest of the list becomes short."""


def learn(argv: Sequence[str], folder: Path) -> set[str]:
    """Start a server in a fork and return what its processes have imported that this one has not."""
    known = set(sys.modules)
    port = free_port()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # The engine core is forked from the server, so it inherits this handler.
        signal.signal(signal.SIGUSR1, lambda *_: dump(folder, known))
        vllm_world.world.serve([*argv, "--host", "127.0.0.1", "--port", str(port)], {})
        os._exit(0)
    try:
        wait_ready(port, argv, folder)
        for member in session_members(pid):
            os.kill(member, signal.SIGUSR1)
        time.sleep(2)
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {name for file in folder.glob("*.json") for name in json.loads(file.read_text())}


def dump(folder: Path, known: set[str]) -> None:
    """Write down what this process has imported."""
    (folder / f"{os.getpid()}.json").write_text(json.dumps(sorted(set(sys.modules) - known)))


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(port: int, argv: Sequence[str], folder: Path) -> None:
    """Wait until the server has answered a request of each kind."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/v1/models")
            model = json.loads(connection.getresponse().read())["data"][0]["id"]
            for path, extra in (
                ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
                ("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
                ("/v1/embeddings", {"input": "a"}),
            ):
                body = json.dumps({"model": model, **extra})
                connection.request("POST", path, body, {"content-type": "application/json"})
                connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"the server does not start:\n{(folder / 'log').read_text()[-3000:]}")


def session_members(session: int) -> list[int]:
    """The processes of a session."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if session_of(pid) == session]


def session_of(pid: int) -> int | None:
    """A process's session."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def shorten(names: set[str]) -> list[str]:
    """The names that bring the others along, found by importing them in a fresh interpreter."""
    ordered = [name for name in FIRST if name in names]
    ordered += sorted(names - set(ordered), key=lambda name: (not name.startswith("vllm."), name.count("."), name))
    code = (
        "import importlib, json, sys\n"
        "from bullpen.zygote.preload import PreloadReport\n"
        "from bullpen.zygote.worlds.vllm import world\n"
        "for name in json.load(sys.stdin):\n"
        "    if name in sys.modules: continue\n"
        "    try: importlib.import_module(name)\n"
        "    except Exception as problem: print(name, problem, file=sys.stderr); continue\n"
        "    print(name)\n"
    )
    prelude = "import torch, vllm.entrypoints.cli.serve\n"
    path = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", prelude + code],
        input=json.dumps(ordered),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in result.stdout.splitlines() if line in names]


def main() -> None:
    """Learn and print."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not part of the list
    vllm_world.world.preload(PreloadReport(), lambda *_: None, modules=())
    with tempfile.TemporaryDirectory() as folder:
        names = learn(sys.argv[1:], Path(folder))
    import vllm

    print(
        f"# What a server of vLLM {vllm.__version__} imports while it starts; made by scripts/learn_modules.py.",
        *shorten(names),
        sep="\n",
        file=output,
        flush=True,
    )
    os._exit(0)  # native libraries complain at an ordinary end


if __name__ == "__main__":
    main()
