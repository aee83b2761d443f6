"""What engines with vLLM's command line have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bullpen.engines import crash
from bullpen.engines.base import Known, Place
from bullpen.engines.crash import Failure
from bullpen.engines.phases import PhaseReader


class OpenAIServer:
    """An engine that is started as ``vllm serve`` is."""

    health_path = "/health"

    def command_line(self, argv: Sequence[str], has_host: bool, place: Place) -> list[str]:
        """Add the host and the port; a later option overrules an earlier one, so ``--port 0`` is overruled too."""
        line = list(argv)
        if not has_host:
            line += ["--host", place.host]
        if place.port is not None:
            line += ["--port", str(place.port)]
        return line

    def environment(self, place: Place, user: Mapping[str, str]) -> dict[str, str]:
        """Sockets go into the instance's own folder; accelerators are named by index, as every vLLM reads them."""
        ours = {"VLLM_RPC_BASE_PATH": str(place.folder)}
        if place.gpu_indices is not None:
            ours["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.gpu_indices))
        return {**ours, **user}

    def phases(self) -> PhaseReader:
        """Both engines print vLLM's lines."""
        return PhaseReader()

    def failure(self, exit_code: int | None, log_tail: bytes, known: Known) -> Failure | None:
        """Both engines fail with vLLM's lines."""
        return crash.classify(exit_code, log_tail, model=known.model, port=known.port, oom_kills=known.oom_kills)
