"""The engines by name."""

from __future__ import annotations

from bullpen.engines.base import Engine
from bullpen.engines.sim import Sim
from bullpen.engines.vllm import Vllm

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Vllm(), Sim())}
