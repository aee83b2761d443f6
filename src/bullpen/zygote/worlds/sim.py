"""The simulator's world: nothing to import but itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bullpen.zygote.preload import PreloadReport, Progress, import_modules, read_names
from bullpen.zygote.worlds import OptionsError

MODULES = ("asyncio", "bullpen.sim.options", "bullpen.sim.server")


FLAGS = "vllm_flags.txt"


class SimWorld:
    """The simulator as the zygote sees it."""

    early_environment: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._known_flags: frozenset[str] | None = None

    def preload(self, report: PreloadReport, progress: Progress) -> dict[str, Any]:
        """Import the simulator's server."""
        import_modules(MODULES, report, progress)
        from bullpen import __version__
        from bullpen.sim import options

        # Where vLLM is installed its flags are accepted and no others; elsewhere nobody knows better than the user.
        if importlib.util.find_spec("vllm") is not None:
            flags = Path(options.__file__).with_name(FLAGS).read_text().splitlines()
            self._known_flags = frozenset(read_names(flags))
        return {"version": __version__}

    def check(self, argv: Sequence[str]) -> dict[str, Any]:
        """Read a command line with the simulator's parser."""
        from bullpen.sim import options

        try:
            parsed = options.parse(argv, self._known_flags)
        except options.OptionsError as problem:
            raise OptionsError(str(problem)) from problem
        return {
            "model": parsed.model,
            "port": parsed.port,
            "host": parsed.host,
            "uds": parsed.uds,
            "tls": False,
            "served_model_names": list(parsed.served_model_names),
            "version": "sim",
            "sleep": None,  # nothing stands in its way
            "utilization": parsed.utilization,
            "devices": parsed.devices,
            "pooling": parsed.pooling,
        }

    def serve(self, argv: Sequence[str], user_environment: Mapping[str, str]) -> int:
        """Run the simulator's server."""
        from bullpen.sim import server

        return int(server.run(argv) or 0)


world = SimWorld()
