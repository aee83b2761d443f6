"""The sentence by which a server is recognised whose engine has died: vLLM must still say it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bullpen.engines.postmortem import ENGINE_DIED
from bullpen.sim.scheduler import EngineDeadError


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's source")
def test_vllm_says_it() -> None:
    specification = importlib.util.find_spec("vllm")
    assert specification is not None and specification.origin is not None
    source = (Path(specification.origin).parent / "v1" / "engine" / "exceptions.py").read_text()
    said = re.search(r'class EngineDeadError.*?ENGINE_DEAD_MESSAGE = "([^"]*)"', source, re.DOTALL)
    assert said is not None and said[1].startswith(ENGINE_DIED)


def test_the_simulator_says_it() -> None:
    assert str(EngineDeadError()).startswith(ENGINE_DIED)
