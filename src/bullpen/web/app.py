"""The application: the faces, the errors, the access rules and the supervisor's life around them."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

from fastapi import FastAPI

from bullpen import __version__
from bullpen.errors import LaunchError
from bullpen.node.host_stats import HostStats
from bullpen.node.launches import Launches
from bullpen.node.settings import Settings
from bullpen.node.supervisor import Supervisor
from bullpen.web import access, body, errors, launches, sleep, swap, system, v1, v2

logger = logging.getLogger("bullpen")

DESCRIPTION = """
vLLM servers, forked from a warm parent in under a second, and managed over REST.

`POST /v2/vllm/instances` starts one; watch it under `/v2/vllm/instances/watch`; talk to it at its `url`.
`POST /v2/vllm/swap` puts some to sleep and has another one ready in their place.
"""


def no_port() -> None:
    """Where gRPC is while it is off."""


def create_app(
    settings: Settings, supervisor: Supervisor | None = None, grpc_port: Callable[[], int | None] = no_port
) -> FastAPI:
    """The daemon as an ASGI application.

    Args:
        settings: the daemon's settings.
        supervisor: one that has started; where None, the application starts one. Its end is the application's.
        grpc_port: says which port gRPC has, and None while it has none.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving = supervisor or Supervisor(settings)
        if supervisor is None:
            await serving.start()
        app.state.supervisor = serving
        app.state.launches = Launches(serving, settings.log_chunk)
        app.state.host_stats = HostStats(serving.resources)
        warm = asyncio.ensure_future(announce_warm(serving))
        try:
            with ending_streams_on_signal(serving):
                yield
        finally:
            warm.cancel()
            # What v1 says of an instance that is no more does not outlive a graceful end either.
            v1.remember(serving, None)
            await serving.close()

    app = FastAPI(
        title="Bullpen",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own pages load their scripts from the internet, which a GPU box may not reach; see `system.docs`.
        docs_url=None,
        redoc_url=None,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.grpc_port = grpc_port
    for face in (system, v2, sleep, swap, launches, v1):
        app.include_router(face.router)
    errors.install(app)
    app.add_middleware(body.BodyLimit)
    app.add_middleware(access.Access, key=settings.access_key, allow_unauthenticated=settings.allow_unauthenticated)
    return app


async def announce_warm(supervisor: Supervisor) -> None:
    """Say when instances can be forked, or why they cannot."""
    for zygote in supervisor.resources.zygotes.all():
        try:
            await zygote.wait_until_warm()
        except LaunchError as problem:
            if not supervisor.is_closing:
                logger.error("%s", problem)
        else:
            print(f"bullpen: engine {zygote.command.engine} warm in {zygote.warmth.seconds:.1f} s", flush=True)


@contextmanager
def ending_streams_on_signal(supervisor: Supervisor) -> Iterator[None]:
    """At SIGTERM or SIGINT end the open streams, and then do what the server does.

    A server waits for open connections before it ends the lifespan; a watch would hold it up for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}

    def end_streams(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(supervisor.begin_shutdown)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for caught in (signal.SIGTERM, signal.SIGINT):
        before[caught] = signal.signal(caught, end_streams)
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
