"""The ``vllm`` engine: real vLLM, unchanged."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bullpen.engines.base import Place
from bullpen.engines.openai_server import OpenAIServer

FROZEN_AT_IMPORT = (
    "HF_*",
    "HUGGINGFACE_*",
    "TRANSFORMERS_*",
    "VLLM_LOGGING_*",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_PLUGINS",
    "VLLM_TARGET_DEVICE",
    "VLLM_USE_MODELSCOPE",
    "PROMETHEUS_MULTIPROC_DIR",
    "OTEL_*",
    "TORCH_*",
    "TORCHINDUCTOR_*",
    "PYTORCH_*",
    "OMP_*",
    "KMP_*",
    "GOMP_*",
    "MKL_*",
    "OPENBLAS_*",
    "LD_*",
    "PYTHON*",
)
"""Variables that vLLM or a library below it reads once, when it is imported or loaded. Set in a fork they would be
ignored without a word."""
READ_LATER = ("HF_TOKEN", "OMP_NUM_THREADS")
"""Exceptions: the token is read at each download, the threads are set in the server (``worlds.vllm``)."""

GATE = "bullpen.gate.asgi.GateMiddleware"
"""Imported by name inside the server, which finds this package as its zygote did."""

HOW_TO_INSTALL = (
    "run `make install` in Bullpen's source tree, or `pip install 'bullpen[vllm]'` on a machine with NVIDIA GPUs"
)


class Vllm(OpenAIServer):
    """vLLM's OpenAI-compatible server."""

    name = "vllm"

    def missing(self, python: str) -> str | None:
        """Look for the package without importing it."""
        if python == sys.executable:
            found = importlib.util.find_spec("vllm") is not None
        else:
            look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
            try:
                found = subprocess.run([python, "-c", look], timeout=30, check=False).returncode == 0
            except (OSError, subprocess.TimeoutExpired) as problem:
                return f"the interpreter {python} cannot be run: {problem}"
        if found:
            return None
        return f"vLLM is not installed in {python}: {HOW_TO_INSTALL}; --engine sim serves a simulator"

    def command_line(self, argv: Sequence[str], has_host: bool, place: Place) -> list[str]:
        """Add the gate, outside every middleware of the user's."""
        return [*super().command_line(argv, has_host, place), "--middleware", GATE]

    def environment(self, place: Place, user: Mapping[str, str]) -> dict[str, str]:
        """Temporary files go into the instance's folder, for vLLM leaves some behind; compiled code stays shared."""
        kept = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        ours = {"TMPDIR": str(place.folder)}
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            ours["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
        return {**ours, **super().environment(place, user)}

    def early_environment(self, user: Mapping[str, str]) -> dict[str, str]:
        """See `FROZEN_AT_IMPORT`."""
        return {
            name: value
            for name, value in user.items()
            if name not in READ_LATER and any(fnmatch.fnmatchcase(name, pattern) for pattern in FROZEN_AT_IMPORT)
        }
