"""Running the daemon: one event loop, one supervisor, and the lines that scripts wait for."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from bullpen.daemon.inference import GrpcFace, rpc_settings
from bullpen.daemon.ports import shown, take_ports
from bullpen.errors import StateError
from bullpen.node.settings import Settings
from bullpen.node.supervisor import Supervisor
from bullpen.rpc.settings import RpcSettings
from bullpen.web.app import create_app, no_port

CLOSE_SECONDS = 2.0
"""What open connections get beyond the stop of the instances, which they may be waiting for."""
IDLE_SECONDS = 120
"""Callers that ask every few seconds keep their connection: one that closes just as they ask is an error to them."""


def serve(settings: Settings) -> int:
    """Run the daemon until a signal ends it; return the exit code."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        rpc = rpc_settings(settings)
        rpc.key_and_certificate()  # what is wrong with them is told before anything starts
        http, grpc = take_ports(settings)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(run(settings, http, rpc, grpc))
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


async def run(settings: Settings, http: socket.socket, rpc: RpcSettings, grpc: socket.socket | None) -> int:
    """Serve at the addresses of two sockets, from the supervisor's start to its end."""
    supervisor = Supervisor(settings)
    await supervisor.start()
    face = None
    if grpc is not None:
        face = GrpcFace(supervisor, rpc, grpc)
        supervisor.end_first(face.stop)
    server = Server(settings, supervisor, face)
    try:
        await server.serve(sockets=[http])
    finally:
        await supervisor.close()
        (settings.state_dir / "url").unlink(missing_ok=True)
    return 0


class Server(uvicorn.Server):
    """uvicorn, saying where it listens once it does, with gRPC beside it.

    Args:
        settings: the daemon's.
        supervisor: one that has started.
        grpc: None where it is off.
    """

    def __init__(self, settings: Settings, supervisor: Supervisor, grpc: GrpcFace | None) -> None:
        self._settings = settings
        self._grpc = grpc
        super().__init__(
            uvicorn.Config(
                create_app(settings, supervisor, grpc.port if grpc is not None else no_port),
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_keep_alive=IDLE_SECONDS,
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
        url = f"http://{shown(sockets[0])}"
        (self._settings.state_dir / "url").write_text(url)
        print(f"bullpen: ready on {url}", flush=True)
        if self._grpc is not None:
            self._grpc.begin()
