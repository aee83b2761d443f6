"""What engines with vLLM's command line have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bullpen.engines import crash, sleeping
from bullpen.engines.base import Known, Place
from bullpen.engines.crash import Failure
from bullpen.engines.phases import PhaseReader

DEVELOPMENT_MODE = "VLLM_SERVER_DEV_MODE"
DEVELOPMENT_ENDPOINTS = "BULLPEN_DEV_ENDPOINTS"
"""Read by the gate (``bullpen.gate``)."""
UTILIZATION = "--gpu-memory-utilization"
SHORTEST_UTILIZATION = "--gp"
API_KEY = "--api-key"
SHORTEST_API_KEY = "--api-k"
"""Options may be abbreviated, down to what no other option begins with."""


class OpenAIServer:
    """An engine that is started as ``vllm serve`` is."""

    health_path = "/health"

    def command_line(self, argv: Sequence[str], has_host: bool, place: Place) -> list[str]:
        """Add what the user left to us; a later option overrules an earlier one, so ``--port 0`` is overruled too."""
        line = list(argv)
        if not has_host:
            line += ["--host", place.host]
        if place.port is not None:
            line += ["--port", str(place.port)]
        if place.sleep and "--enable-sleep-mode" not in argv:
            line.append("--enable-sleep-mode")
        if place.share is not None and not any(is_option(word, UTILIZATION, SHORTEST_UTILIZATION) for word in argv):
            line += [UTILIZATION, f"{place.share:g}"]
        return line

    def environment(self, place: Place, user: Mapping[str, str]) -> dict[str, str]:
        """Sockets go into the instance's own folder; accelerators are counted as NVML counts them."""
        ours = {"VLLM_RPC_BASE_PATH": str(place.folder)}
        if place.visible_devices is not None:
            ours["CUDA_VISIBLE_DEVICES"] = ",".join(place.visible_devices)
            ours["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        if place.sleep and DEVELOPMENT_MODE not in user:
            # The calls that put it to sleep are among the development endpoints: nobody else shall find those.
            ours[DEVELOPMENT_MODE] = "1"
            ours[DEVELOPMENT_ENDPOINTS] = "loopback"
        return {**ours, **user}

    sleep_calls = staticmethod(sleeping.sleep_calls)
    deepen_calls = staticmethod(sleeping.deepen_calls)
    wake_calls = staticmethod(sleeping.wake_calls)
    canary = staticmethod(sleeping.canary)
    canary_answer = staticmethod(sleeping.canary_answer)
    same_answer = staticmethod(sleeping.same_answer)

    def api_key(self, argv: Sequence[str], environment: Mapping[str, str]) -> str | None:
        """The last ``--api-key`` counts, of several keys the first; the variable counts where there is no option."""
        key = None
        for place, word in enumerate(argv):
            if is_option(word, API_KEY, SHORTEST_API_KEY):
                _, equals, attached = word.partition("=")
                key = attached if equals else next(iter(argv[place + 1 : place + 2]), None)
        return key or environment.get("VLLM_API_KEY") or None

    def phases(self) -> PhaseReader:
        """Both engines print vLLM's lines."""
        return PhaseReader()

    def failure(self, exit_code: int | None, log_tail: bytes, known: Known) -> Failure | None:
        """Both engines fail with vLLM's lines."""
        return crash.classify(exit_code, log_tail, model=known.model, port=known.port, oom_kills=known.oom_kills)


def is_option(word: str, option: str, shortest: str) -> bool:
    """Whether a word of a command line is that option, perhaps abbreviated, with underscores or with its value."""
    name = word.partition("=")[0].replace("_", "-")
    return name.startswith(shortest) and option.startswith(name)
