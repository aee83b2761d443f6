"""The ``sim`` engine: a stand-in for work on everything around an engine."""

from __future__ import annotations

from collections.abc import Mapping

from bullpen.engines.openai_server import OpenAIServer


class Sim(OpenAIServer):
    """The simulator; it runs in any interpreter."""

    name = "sim"

    def missing(self, python: str) -> str | None:
        """It is part of Bullpen."""
        return None

    def early_environment(self, user: Mapping[str, str]) -> dict[str, str]:
        """It reads its variables when a server starts; only the loader's and Python's own count earlier."""
        return {name: value for name, value in user.items() if name.startswith(("LD_", "PYTHON"))}
