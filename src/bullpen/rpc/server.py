"""The gRPC server: both services, health and reflection, on one port."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from bullpen.errors import StateError
from bullpen.rpc import bootstrap, inference
from bullpen.rpc.access import Access
from bullpen.rpc.ports import InstanceFinder
from bullpen.rpc.reflection import pool
from bullpen.rpc.settings import RpcSettings
from bullpen.rpc.upstream import Upstream

SERVICES = (inference.SERVICE, bootstrap.SERVICE)

_OPTIONS = [
    # A second daemon on a port is a mistake to be told of, not a sharer of its calls.
    ("grpc.so_reuseport", 0),
    # Callers carry no deadline as a rule. One whose host is gone is noticed after a minute, and its requests end.
    ("grpc.keepalive_time_ms", 40_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # And callers may ask as often whether we are here.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class RpcServer:
    """Serves inference with the instances that `instances` finds; belongs to the event loop that starts it.

    Attributes:
        port: where it listens, once it is started.
    """

    def __init__(self, instances: InstanceFinder, settings: RpcSettings) -> None:
        self._instances = instances
        self._settings = settings
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            StateError: the address is taken or not this host's, or the certificate cannot be used.
        """
        settings = self._settings
        self._upstream = Upstream(settings.most_connections)
        server = grpc.aio.server(
            interceptors=[Access(settings.access_key, settings.allow_unauthenticated)],
            options=_OPTIONS if settings.limit_message_size else _OPTIONS + _UNLIMITED,
        )
        server.add_generic_rpc_handlers(
            (
                bootstrap.Bootstrap(self._instances, self._upstream).handler(),
                inference.Inference(self._instances, self._upstream).handler(),
            )
        )
        self._health = health.aio.HealthServicer()
        add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server, pool=pool())
        self.port = self._bind(server)
        await server.start()
        self._server = server
        for name in ("", *SERVICES):
            await self._health.set(name, HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Accept nothing any more, give calls under way `grace` seconds to end, then end them."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        self._upstream.close()
        self._server = None

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.port}"
        credentials = self._credentials()
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as problem:
            raise StateError(
                f"cannot listen for gRPC on {address}; choose another --grpc-port or --host, or end the program there"
            ) from problem

    def _credentials(self) -> grpc.ServerCredentials | None:
        pair = self._settings.key_and_certificate()
        return None if pair is None else grpc.ssl_server_credentials([pair])
