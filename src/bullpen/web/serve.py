"""The daemon as a process: one socket, one event loop, one supervisor, and the lines that scripts wait for."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from bullpen.errors import StateError
from bullpen.node.settings import Settings
from bullpen.node.supervisor import Supervisor
from bullpen.web.app import create_app

CLOSE_SECONDS = 2.0
"""What open connections get beyond the stop of the instances, which they may be waiting for."""


def serve(settings: Settings) -> int:
    """Run the daemon until a signal ends it; return the exit code."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        listener = listen(settings.host, settings.port)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(run(settings, listener))
    except StateError as problem:
        print(f"bullpen: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def new_loop() -> asyncio.AbstractEventLoop:
    """The faster event loop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        StateError: another program does, or this host has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise StateError(
            f"cannot listen on {host}:{port}: {problem.strerror};"
            " choose another --host or --port, or end the program there"
        ) from problem
    return listener


async def run(settings: Settings, listener: socket.socket) -> int:
    """Serve on a socket, from the supervisor's start to its end."""
    supervisor = Supervisor(settings)
    await supervisor.start()
    server = Server(settings, supervisor)
    try:
        await server.serve(sockets=[listener])
    finally:
        await supervisor.close()
        (settings.state_dir / "url").unlink(missing_ok=True)
    return 0


class Server(uvicorn.Server):
    """uvicorn, saying where it listens once it does."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        super().__init__(
            uvicorn.Config(
                create_app(settings, supervisor),
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_graceful_shutdown=int(settings.stop_timeout + CLOSE_SECONDS),
                server_header=False,
                proxy_headers=False,  # who calls decides what is allowed, so nobody else may say who calls
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order at a signal; uvicorn would raise it again, and the exit would look like a kill."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if not self.started or not sockets:
            return
        host, port = sockets[0].getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        url = f"http://{shown}:{port}"
        (self._settings.state_dir / "url").write_text(url)
        print(f"bullpen: ready on {url}", flush=True)
