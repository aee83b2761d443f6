"""Inference over gRPC with the daemon's instances.

gRPC's library is imported after the REST API answers, on another thread: nobody should wait for it who does not use it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import ChainMap
from importlib import import_module
from typing import TYPE_CHECKING

from bullpen.core.instance import Instance
from bullpen.daemon.ports import shown
from bullpen.engines.registry import ENGINES
from bullpen.errors import NotFoundError
from bullpen.node.launches import model_of, state_of, task_of
from bullpen.node.settings import Settings
from bullpen.node.supervisor import Supervisor
from bullpen.rpc.ports import Served
from bullpen.rpc.settings import RpcSettings

if TYPE_CHECKING:
    from bullpen.rpc.server import RpcServer

logger = logging.getLogger("bullpen")

VERBOSITY = "GRPC_VERBOSITY"
GRACE_SECONDS = 1.0
"""What calls get to end by themselves when the daemon does."""


class Instances:
    """Finds what calls are for: any instance, whichever API made it.

    Args:
        supervisor: it has them all.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def find(self, launch_id: str) -> Served | None:
        """The instance of this id, as it is now; None where there is none."""
        try:
            return served(self._supervisor.fleet.get(launch_id))
        except NotFoundError:
            return None


def served(instance: Instance) -> Served:
    """An instance as callers of inference see it."""
    names = instance.served.served_model_names if instance.served is not None else ()
    # The server has the daemon's environment, and the instance's own on top.
    environment = ChainMap(dict(instance.config.env_vars or {}), os.environ)
    return Served(
        launch_id=instance.id,
        state=state_of(instance),
        task=task_of(instance),
        address=instance.address,
        served_model_name=names[0] if names else model_of(instance),
        api_key=ENGINES[instance.config.engine].api_key(instance.config.argv, environment),
    )


def rpc_settings(settings: Settings) -> RpcSettings:
    """What the gRPC server needs of the daemon's settings, its port aside."""
    return RpcSettings(
        host=settings.host,
        access_key=settings.access_key,
        allow_unauthenticated=settings.allow_unauthenticated,
        certificate=settings.grpc_tls_cert,
        private_key=settings.grpc_tls_key,
        limit_message_size=settings.grpc_limit_message_size,
    )


class GrpcFace:
    """The daemon's gRPC server, from its start in the background to its end; belongs to one event loop.

    Args:
        supervisor: it has the instances.
        settings: all but the port.
        address: a socket that keeps the address until the server has it.
    """

    def __init__(self, supervisor: Supervisor, settings: RpcSettings, address: socket.socket) -> None:
        self._instances = Instances(supervisor)
        self._settings = settings.at(address.getsockname()[1])
        self._shown = shown(address)
        self._address = address
        self._starting: asyncio.Task[RpcServer | None] | None = None
        self._stopped = False
        self._failed = False

    def port(self) -> int | None:
        """Where it listens, or is about to; None once it has failed."""
        return None if self._failed else self._settings.port

    def begin(self) -> None:
        """Start in the background. What fails now is logged, and the daemon goes on without gRPC."""
        if not self._stopped:
            self._starting = asyncio.ensure_future(self._start())

    async def stop(self) -> None:
        """Take no more calls, give those under way `GRACE_SECONDS` to end, then end them."""
        self._stopped = True
        server = await self._starting if self._starting is not None else None
        self._address.close()
        if server is not None:
            await server.stop(GRACE_SECONDS)

    async def _start(self) -> RpcServer | None:
        try:
            server = await self._serve()
        except Exception as problem:  # an installation that does not fit fails in ways of its own
            self._failed = True
            logger.error("gRPC is not served, all else is (%s: %s)", type(problem).__name__, problem)
            return None
        finally:
            self._address.close()
        print(f"bullpen: gRPC ready on {self._shown}", flush=True)
        return server

    async def _serve(self) -> RpcServer:
        # It reports on standard error whatever it finds remarkable. The zygote's environment was read before this.
        os.environ.setdefault(VERBOSITY, "ERROR")
        module = await asyncio.to_thread(import_module, "bullpen.rpc.server")
        server: RpcServer = module.RpcServer(self._instances, self._settings)
        await server.start()
        return server
