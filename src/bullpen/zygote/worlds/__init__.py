"""Worlds: what the zygote must know of an engine, in the engine's own interpreter.

A world is the inner half of an engine; the outer half, which the daemon uses, is in ``bullpen.engines``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bullpen.zygote.preload import PreloadReport, Progress

NAMES = ("vllm", "sim")


class OptionsError(ValueError):
    """The engine's parser refuses a command line; the text is its sentence."""


class World(Protocol):
    """What the zygote asks of an engine."""

    early_environment: Mapping[str, str]
    """Variables that must be set before the first import, where the user has not set them."""

    def preload(self, report: PreloadReport, progress: Progress) -> dict[str, Any]:
        """Import and prepare everything that every server needs; return facts (``version``, …).

        Raises:
            Exception: the engine cannot be imported at all.
        """

    def check(self, argv: Sequence[str]) -> dict[str, Any]:
        """Have the engine's own parser read a command line; return ``model``, ``port``, ``host``, ``uds``, ``tls``
        and ``served_model_names`` as it understands them (None where not given).

        Raises:
            OptionsError: it refuses.
        """

    def serve(self, argv: Sequence[str], user_environment: Mapping[str, str]) -> int:
        """Run the server in this process, to its end; return the exit code."""


def load(name: str) -> World:
    """The world of one engine.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"no engine {name!r}; there are {', '.join(NAMES)}")
    world: World = importlib.import_module(f"bullpen.zygote.worlds.{name}").world
    return world
