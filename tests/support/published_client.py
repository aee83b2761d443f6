"""vllm-bootstrap's published client, unchanged, in an interpreter of its own."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "BULLPEN_BOOTSTRAP_CLIENT_PYTHON"
"""Names that interpreter, where it is not the one that `make tools` makes."""
PYTHON = os.environ.get(VARIABLE) or str(Path(__file__).parents[2] / ".venv/published-client/bin/python")
SECONDS = 60.0

needs_published_client = pytest.mark.skipif(
    not Path(PYTHON).exists(), reason=f"{PYTHON} does not exist: type `make tools`, or set {VARIABLE}"
)


async def run_script(script: str, *arguments: str) -> Any:
    """What a script prints, which is JSON; it must succeed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = await asyncio.create_subprocess_exec(
        PYTHON, "-c", script, *arguments, stdout=asyncio.subprocess.PIPE, env=inherited
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError(f"the script did not end within {SECONDS} s") from None
    assert process.returncode == 0
    return json.loads(output)
