"""The engine child: the process behind the server that would hold the model; here it holds the sleep state.

It also holds accelerator memory, as far as mock GPUs go: half of it from loading the weights on, the rest for the KV
cache, less while it sleeps. Where that is more than a GPU has left, starting and waking fail as they do in vLLM.

It is forked by `bullpen.sim.engine` and talks over a SOCK_SEQPACKET pair: it sends one packet when it is ready, then
answers each JSON packet with one. It never returns to its caller.
"""

import json
import math
import os
import select
import signal
import socket
import time
from types import FrameType
from typing import NoReturn

from bullpen.sim.gpus import MockGpus, OutOfMemoryError
from bullpen.sim.log import Log
from bullpen.sim.memory import Memory
from bullpen.sim.options import SimOptions
from bullpen.sim.settings import Settings

MAX_PACKET = 64 * 1024
KV_CACHE_TOKENS = 131_072
READY = b"ready"

# What is loaded when, as a share of the start-up time. The server's own phases come before and after.
_INITIALIZED, _LOADED, _ALLOCATED = 0.4, 0.7, 0.9
_SHARDS = 4
_FOREVER_SECONDS = 3600.0


class EngineChild:
    """The engine child's life: start up, answer, end when the server is gone."""

    def __init__(self, options: SimOptions, settings: Settings, link: socket.socket, started: float) -> None:
        self._options = options
        self._settings = settings
        self._link = link
        self._started = started  # time.monotonic() when the server process began; one clock serves both processes
        self._memory = Memory(pooled=options.enable_sleep_mode)
        self._gpus = MockGpus(settings.gpu_folders)
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
            self._gpus.release()
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
            signal.signal(number, signal.SIG_IGN if self._settings.stubborn else self._end_by_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})

    def _start_up(self) -> None:
        """Pass through the phases of an engine core's start, with vLLM's log lines.

        Raises RuntimeError if told so, and OutOfMemoryError.
        """
        options, begun = self._options, time.monotonic()
        names = list(options.served_model_names)
        self._log.info(
            f"Initializing a V1 LLM engine (vsim) with config: model={options.model!r}, served_model_name={names}",
            where="core.py:133",
        )
        self._rest_until(_INITIALIZED)
        if self._settings.fails("start"):
            raise RuntimeError("the simulated engine fails to start because BULLPEN_SIM_FAIL=start asks for it")
        loading = time.monotonic()
        self._worker_log.info(f"Starting to load model {options.model}...", where="gpu_model_runner.py:5040")
        self._gpus.hold(self._settings.awake_mib // 2)
        for shard in range(_SHARDS + 1):
            self._rest_until(_INITIALIZED + (_LOADED - _INITIALIZED) * shard / _SHARDS)
            progress = f"{100 * shard // _SHARDS:3d}% Completed | {shard}/{_SHARDS} [00:00<?, ?it/s]"
            self._log.plain(f"Loading safetensors checkpoint shards: {progress}")
        loaded = time.monotonic()
        self._worker_log.info(f"Loading weights took {loaded - loading:.2f} seconds", where="default_loader.py:501")
        self._rest_until(_ALLOCATED)
        self._gpus.hold(self._settings.awake_mib)
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
        """Do what the server asks; say which memory sleeps then and whether the weights are lost, or what went wrong.

        `operation` is `sleep` (with `level`), `wake` (with `tags` or null), `reload_weights` or `look`.
        """
        operation, tags = call["operation"], call.get("tags")
        try:
            if operation == "sleep":
                level = 2 if call.get("level") == 2 else 1
                self._change("sleep", self._memory.slept(level), self._settings.sleep_seconds, "fall asleep")
            elif operation == "wake":
                wanted = [str(tag) for tag in tags] if isinstance(tags, list) else None
                after = self._memory.woken(wanted)
                self._change("wake", after, self._settings.wake_seconds, f"wake up tags {wanted}")
            elif operation == "reload_weights":
                self._reload()
        except RuntimeError as error:
            self._log.error(f"{type(error).__name__}: {error}", where="core.py:1730")
            return {"error": str(error)}
        return {"asleep": sorted(self._memory.asleep), "weights_lost": self._memory.weights_lost}

    def _change(self, operation: str, after: Memory | None, seconds: float, doing: str) -> None:
        """Fall asleep or wake up; `after` is the memory then, None where nothing changes. Raises RuntimeError."""
        begun = time.monotonic()
        if self._settings.fails(operation):
            raise RuntimeError(
                f"the simulated engine fails to {operation} because BULLPEN_SIM_FAIL={operation} asks for it"
            )
        if after:
            self._rest(begun + seconds / 2)
        if self._settings.fails(f"{operation}_exit"):
            self._log.error(f"the simulated engine ends, as {operation}_exit asks for it", where="sim")
            os._exit(1)  # what it held on its GPUs is its no more, though its files stay, as after any crash
        if self._settings.fails(f"{operation}_hang"):
            self._log.error(f"the simulated engine hangs, as {operation}_hang asks for it", where="sim")
            self._rest(math.inf)
        if after:
            self._hold(after)
            self._rest(begun + seconds)
            self._memory = after
            self._log.info(f"It took {time.monotonic() - begun:.6f} seconds to {doing}.", where="abstract.py:390")

    def _hold(self, memory: Memory) -> None:
        """Hold what this memory needs. Raises RuntimeError, in the words of vLLM's allocator."""
        try:
            self._gpus.hold(memory.held(self._settings.awake_mib, self._settings.asleep_mib))
        except OutOfMemoryError as error:
            raise RuntimeError(f"CUDA Error: out of memory at cumem_allocator.cpp ({error})") from None

    def _reload(self) -> None:
        """Read the weights again, which takes as long as it took at the start. Raises RuntimeError."""
        after = self._memory.reloaded()
        if after is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (the weights are asleep)")
        self._rest(time.monotonic() + (_LOADED - _INITIALIZED) * self._settings.start_seconds)
        self._memory = after

    def _rest_until(self, share: float) -> None:
        self._rest(self._started + share * self._settings.start_seconds)

    def _rest(self, deadline: float) -> None:
        """Let time pass until a moment of time.monotonic(), unless the server ends before."""
        while (left := deadline - time.monotonic()) > 0:
            if self._hangup.poll(min(left, _FOREVER_SECONDS) * 1000):
                self._end_orphaned()

    def _end_by_signal(self, number: int, frame: FrameType | None) -> None:
        """Take the files away, then end as the signal would have ended the process."""
        self._gpus.release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _end_orphaned(self) -> NoReturn:
        """End, as the server has ended; a stubborn child stays, with all that it has inherited."""
        while self._settings.stubborn:
            time.sleep(_FOREVER_SECONDS)
        self._gpus.release()
        os._exit(0)
