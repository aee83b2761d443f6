"""The engine child: the process behind the server that would hold the model; here it holds the sleep state.

It is forked by `bullpen.sim.engine` and talks over a SOCK_SEQPACKET pair: it sends one packet when it is ready, then
answers each JSON packet with one. It never returns to its caller.
"""

import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import NoReturn

from bullpen.sim.log import Log
from bullpen.sim.options import SimOptions
from bullpen.sim.settings import Settings

MAX_PACKET = 64 * 1024
KV_CACHE_TOKENS = 131_072
READY = b"ready"

# What is loaded when, as a share of the start-up time. The server's own phases come before and after.
_INITIALIZED, _LOADED, _ALLOCATED = 0.4, 0.7, 0.9
_SHARDS = 4
_FOREVER_SECONDS = 3600.0


@dataclass
class Memory:
    """Which parts of the accelerator's memory are asleep; the rules are those of vLLM's executor."""

    asleep: set[str] = field(default_factory=set)

    def sleep(self) -> bool:
        """Put everything to sleep; False where it sleeps already."""
        if "weights" in self.asleep:
            return False
        self.asleep = {"weights", "kv_cache"}
        return True

    def wake(self, tags: list[str] | None) -> bool:
        """Wake the named parts, or all; False where one of them does not sleep."""
        if not self.asleep or (tags and not self.asleep.issuperset(tags)):
            return False
        self.asleep = self.asleep - set(tags) if tags else set()
        return True


class EngineChild:
    """The engine child's life: start up, answer, end when the server is gone."""

    def __init__(self, options: SimOptions, settings: Settings, link: socket.socket, started: float) -> None:
        self._options = options
        self._settings = settings
        self._link = link
        self._started = started  # time.monotonic() when the server process began; one clock serves both processes
        self._memory = Memory()
        self._log = Log("EngineCore")
        self._worker_log = Log("Worker")
        self._hangup = select.poll()
        self._hangup.register(link, select.POLLRDHUP)

    def run(self) -> NoReturn:
        """Run until the server ends, or for good where the child is stubborn."""
        self._take_signals()
        try:
            self._start_up()
        except RuntimeError as error:
            self._log.error("EngineCore failed to start.", where="core.py:1510")
            self._log.traceback(error)
            os._exit(1)
        try:
            self._link.send(READY)
            while packet := self._link.recv(MAX_PACKET):
                self._link.send(json.dumps(self._answer(json.loads(packet))).encode())
        except OSError:
            pass  # the server ended while it was being answered
        self._end_orphaned()

    def _take_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if self._settings.stubborn else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})

    def _start_up(self) -> None:
        """Pass through the phases of an engine core's start, with vLLM's log lines. Raises RuntimeError if told so."""
        options, begun = self._options, time.monotonic()
        names = list(options.served_model_names)
        self._log.info(
            f"Initializing a V1 LLM engine (vsim) with config: model={options.model!r}, served_model_name={names}",
            where="core.py:133",
        )
        self._rest_until(_INITIALIZED)
        if self._settings.fail == "start":
            raise RuntimeError("the simulated engine fails to start because BULLPEN_SIM_FAIL=start asks for it")
        loading = time.monotonic()
        self._worker_log.info(f"Starting to load model {options.model}...", where="gpu_model_runner.py:5040")
        for shard in range(_SHARDS + 1):
            self._rest_until(_INITIALIZED + (_LOADED - _INITIALIZED) * shard / _SHARDS)
            progress = f"{100 * shard // _SHARDS:3d}% Completed | {shard}/{_SHARDS} [00:00<?, ?it/s]"
            self._log.plain(f"Loading safetensors checkpoint shards: {progress}")
        loaded = time.monotonic()
        self._worker_log.info(f"Loading weights took {loaded - loading:.2f} seconds", where="default_loader.py:501")
        self._rest_until(_ALLOCATED)
        length = options.max_model_len or KV_CACHE_TOKENS
        self._log.info(
            f"GPU KV cache size: {KV_CACHE_TOKENS:,} tokens, "
            f"Maximum concurrency for {length:,} tokens per request: {KV_CACHE_TOKENS / length:.2f}x",
            where="kv_cache_utils.py:2327",
        )
        seconds = time.monotonic() - begun
        self._log.info(
            f"init engine (profile, create kv cache, warmup model) took {seconds:.2f} s", where="core.py:402"
        )

    def _answer(self, call: dict[str, object]) -> dict[str, object]:
        """Do what the server asks: `{"operation": "sleep" or "wake", "tags": [...] or null}`."""
        operation, tags = call["operation"], call.get("tags")
        if operation == self._settings.fail:
            message = f"the simulated engine fails to {operation} because BULLPEN_SIM_FAIL={operation} asks for it"
            self._log.error(f"RuntimeError: {message}", where="core.py:1730")
            return {"error": message}
        begun = time.monotonic()
        if operation == "sleep":
            seconds, changed, doing = self._settings.sleep_seconds, self._memory.sleep(), "fall asleep"
        else:
            wanted = [str(tag) for tag in tags] if isinstance(tags, list) else None
            seconds, changed, doing = self._settings.wake_seconds, self._memory.wake(wanted), f"wake up tags {wanted}"
        if changed:
            self._rest(begun + seconds)
            self._log.info(f"It took {time.monotonic() - begun:.6f} seconds to {doing}.", where="abstract.py:390")
        return {"asleep": sorted(self._memory.asleep)}

    def _rest_until(self, share: float) -> None:
        self._rest(self._started + share * self._settings.start_seconds)

    def _rest(self, deadline: float) -> None:
        """Let time pass until a moment of time.monotonic(), unless the server ends before."""
        while (left := deadline - time.monotonic()) > 0:
            if self._hangup.poll(min(left, _FOREVER_SECONDS) * 1000):
                self._end_orphaned()

    def _end_orphaned(self) -> NoReturn:
        """End, as the server has ended; a stubborn child stays, with all that it has inherited."""
        while self._settings.stubborn:
            time.sleep(_FOREVER_SECONDS)
        os._exit(0)
