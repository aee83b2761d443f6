"""The server process: bind, start up phase by phase with vLLM's log lines, serve, end."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from bullpen.gate.state import Gate
from bullpen.sim.door import Door
from bullpen.sim.engine import Engine, EngineLink
from bullpen.sim.engine_child import KV_CACHE_TOKENS
from bullpen.sim.http import HttpServer
from bullpen.sim.log import Log, fill
from bullpen.sim.options import DEFAULT_PORT, OptionsError, SimOptions, parse
from bullpen.sim.routes import Routes
from bullpen.sim.scheduler import Scheduler
from bullpen.sim.settings import Settings, SettingsError, read_settings

# The server's own phases of start-up, as shares of its time; what lies between is the engine child's.
_CONFIGURED, _SERVING = 0.1, 1.0
# How long the server still answers (503) after its engine child has died, and how long clients and the engine child
# may take to end with the server.
_DEAD_SECONDS = 1.0
_GRACE_SECONDS = 0.5


class _Terminated(BaseException):
    """SIGTERM or SIGINT came before the server served."""


def run(argv: Sequence[str]) -> int:
    """Run the simulator with vLLM's command line until it ends; return the exit code.

    To be called in a process of its own that has one thread: signals, the alarm timer and forking are its business.
    Settings come from the environment; everything is logged to descriptors 1 and 2.
    """
    started = time.monotonic()
    log = Log("APIServer")
    log.plain("bullpen sim: this is a simulator, no model is loaded")
    try:
        settings = read_settings(os.environ)
        options = parse(argv)
    except SettingsError as error:
        log.error(str(error), where="sim")
        return 1
    except OptionsError as error:
        log.plain(f"api_server.py: error: {error}")
        return 2
    _take_signals(settings, log)
    fill(settings.log_bytes)
    try:
        return _start_and_serve(options, settings, log, started)
    except _Terminated:
        return 0
    except Exception as error:
        log.traceback(error)
        return 1


def _take_signals(settings: Settings, log: Log) -> None:
    """Set what signals do until the event loop takes over, and the alarm that ends the process by itself."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    def exit_by_itself(number: int, frame: FrameType | None) -> NoReturn:
        # As abrupt as a crash: nothing is closed and no one is told.
        log.plain(f"bullpen sim: ending with exit code {settings.exit_code}, as BULLPEN_SIM_EXIT_AFTER asks")
        os._exit(settings.exit_code)

    signal.signal(signal.SIGINT, terminate)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if settings.stubborn >= 2 else terminate)
    if settings.exit_after is not None:
        signal.signal(signal.SIGALRM, exit_by_itself)
        signal.setitimer(signal.ITIMER_REAL, max(settings.exit_after, 1e-6))  # 0 would turn the timer off


def _start_and_serve(options: SimOptions, settings: Settings, log: Log, started: float) -> int:
    log.info(f"non-default args: {dict(options.given)}", where="api_utils.py:286")
    with _bind(options) as bound:
        address = _address(options, bound)
        _rest_until(started + _CONFIGURED * settings.start_seconds)
        log.info("Resolved architecture: SimForCausalLM", where="model.py:733")
        log.info(f"Using max model len {options.max_model_len or KV_CACHE_TOKENS}", where="model.py:2152")
        link = EngineLink.fork(options, settings, started)
        try:
            link.wait_ready()
            _rest_until(started + _SERVING * settings.start_seconds)
            return asyncio.run(_Server(options, settings, link, log).serve(bound, address))
        finally:
            link.terminate()


def _bind(options: SimOptions) -> socket.socket:
    """Bind the address before anything else, without listening yet, as vLLM does. Raises OSError."""
    if options.uds:
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(options.uds)
        return bound
    host = options.host or ""
    # asyncio turns Nagle's algorithm off only where the protocol is named.
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, DEFAULT_PORT if options.port is None else options.port))
    return bound


def _address(options: SimOptions, bound: socket.socket) -> str:
    if options.uds:
        return f"unix:{options.uds}"
    host = options.host or "0.0.0.0"
    return f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


def _rest_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


class _Server:
    """The part of the server's life that has an event loop."""

    def __init__(self, options: SimOptions, settings: Settings, link: EngineLink, log: Log) -> None:
        scheduler = Scheduler(settings.tokens_per_second)
        self._engine = Engine(link, scheduler, settings)
        routes = Routes(options, settings, self._engine, scheduler, log)
        self._http = HttpServer(Door(Gate.from_environment(os.environ), routes), log)
        self._link = link
        self._log = log
        self._scheduler = scheduler
        self._settings = settings
        self._stop = asyncio.Event()

    async def serve(self, bound: socket.socket, address: str) -> int:
        """Serve until a signal comes or the engine child ends; return the exit code. Raises OSError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stop.set)
        if self._settings.stubborn < 2:
            loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        watch = asyncio.create_task(self._engine.watch())
        self._log.info(f"Starting vLLM server on {address}", where="entry.py:140")
        await self._http.listen(bound)
        self._log.plain(f"INFO:     Started server process [{os.getpid()}]")
        self._log.plain("INFO:     Waiting for application startup.")
        self._log.plain("INFO:     Application startup complete.")
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({watch, stop}, return_when=asyncio.FIRST_COMPLETED)
        if watch.done() and not self._stop.is_set():
            message = (
                f"Engine core proc EngineCore died unexpectedly (exit code {watch.result()}), shutting down client."
            )
            self._log.error(message, where="core_client.py:712")
            await asyncio.wait({stop}, timeout=_DEAD_SECONDS)
        await self._end(watch)
        return 0

    async def _end(self, watch: asyncio.Task[int | None]) -> None:
        self._log.info("[shutdown] API server: shutdown triggered", where="launcher.py:254")
        self._scheduler.abort_all()
        await self._http.close(_GRACE_SECONDS)
        self._link.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(watch, _GRACE_SECONDS)
        self._log.plain("INFO:     Application shutdown complete.")
