"""The demo's two models, and what vLLM is here: both belong to the engine's interpreter, so it is asked."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bullpen.demo import tiny_models
from bullpen.demo.checks import DemoError
from bullpen.engines.registry import ENGINES

SEEDS = {"tiny-a": 1, "tiny-b": 2}
MAKE_SECONDS = 300.0
"""Importing torch from a cold disk is nearly all of it."""

ASK_VERSION = "import importlib.metadata; print(importlib.metadata.version('vllm'))"
COMMON_OPTIONS = ("--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(64 * 2**20))
CPU_OPTIONS = ("--dtype", "float32")
GPU_OPTIONS = ("--gpu-memory-utilization", "0.05")
"""vLLM wants this share of a GPU to be free, whatever the cache is told to take."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1"}
"""Nothing of the demo leaves this machine."""
MISLEADING = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ACCESS_KEY")
"""Variables that would overrule the options above, or the daemon's settings."""


@dataclass(frozen=True)
class Engine:
    """The vLLM that the demo runs."""

    python: str
    version: str

    @property
    def is_cpu(self) -> bool:
        """Whether it is the build for the CPU; vLLM itself tells them apart in the same way."""
        return "cpu" in self.version

    def options(self, model: Path) -> tuple[str, ...]:
        """The options that start a model of the demo, the same for the cold and for the warm start."""
        fitting = CPU_OPTIONS if self.is_cpu else GPU_OPTIONS
        return (str(model), "--served-model-name", model.name, *COMMON_OPTIONS, *fitting)


def find_engine(python: str) -> Engine:
    """Look for vLLM in an interpreter.

    Raises:
        DemoError: it is not there; the text says how to install it.
    """
    if missing := ENGINES["vllm"].missing(python):
        raise DemoError(missing)
    return Engine(python, run(python, "-c", ASK_VERSION, what="to ask for vLLM's version", seconds=60).strip())


def make_models(engine: Engine, folder: Path) -> list[Path]:
    """Make the models that are not there yet.

    Raises:
        DemoError: the folder cannot be written, or the models cannot be made.
    """
    paths = [folder / name for name in SEEDS]
    if not all((path / "config.json").exists() for path in paths):
        check_folder(folder)
    items = [f"{name}={seed}" for name, seed in SEEDS.items()]
    run(engine.python, str(tiny_models.__file__), str(folder), *items, what="to make the models", seconds=MAKE_SECONDS)
    return paths


def check_folder(folder: Path) -> None:
    """Make a folder that is not there yet, and see whether it can be written.

    Raises:
        DemoError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise DemoError(
            f"the models cannot be kept in {folder} ({problem.strerror}); name one that can be written with --cache"
        ) from problem


def cache_folder(given: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the models are kept: ``given``, else ``$XDG_CACHE_HOME/bullpen/demo``."""
    if given is not None:
        return given.expanduser().absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bullpen" / "demo"


def environment(**more: str) -> dict[str, str]:
    """The environment of what the demo starts: this one, offline, without what would change the demo."""
    kept = {
        name: value for name, value in os.environ.items() if name not in MISLEADING and not name.startswith("BULLPEN_")
    }
    return {**kept, **ENVIRONMENT, **more}


def run(*command: str, what: str, seconds: float) -> str:
    """Run a short program and return what it prints.

    Raises:
        DemoError: it fails, or takes too long; the text quotes its last line.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False, errors="replace"
        )
    except OSError as problem:
        raise DemoError(f"{command[0]} cannot be run {what}: {problem.strerror}") from problem
    except subprocess.TimeoutExpired as problem:
        raise DemoError(f"{command[0]}, run {what}, has not ended after {seconds:.0f} s") from problem
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise DemoError(f"{command[0]}, run {what}, ended with exit code {done.returncode}: {last}")
    return done.stdout
