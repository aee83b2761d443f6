"""The launch API: a model and GPUs go in, a launch comes out; see ``bullpen.node.launches``."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from bullpen.core.book import Hold
from bullpen.node.host_stats import HostStats
from bullpen.node.launches import Launches, Wanted, timestamp
from bullpen.node.logs import Piece
from bullpen.web import launch_models as models
from bullpen.web.errors import documented
from bullpen.web.v2 import supervisor_of

router = APIRouter(tags=["launches"])

LARGE_PIECE = 64 * 1024
"""Bytes of a log that take long enough to be made text that nobody else should wait for it."""


def launches_of(request: Request) -> Launches:
    """The launches that the app serves."""
    launches: Launches = request.app.state.launches
    return launches


@router.post(
    "/launch",
    status_code=201,
    response_model=models.Launch,
    responses=documented(400, 409, 422, 500),
    summary="Launch a model",
)
async def launch(request: Request, body: models.LaunchRequest) -> Response:
    """Launch a model; the reply comes at once, and `GET /status/{launch_id}` says when it is ready.

    GPUs that others have, and what cannot be on this host, are refused. Options that vLLM refuses make the launch fail.
    """
    launches = launches_of(request)
    instance = await launches.launch(Wanted(**dict(body)))
    return JSONResponse(launches.describe(instance, time.time()), 201)


@router.get("/launch", response_model=list[models.Launch], summary="The launches that have not ended")
async def list_launches(request: Request) -> Response:
    """List the launches that have not ended, oldest first; instances of the other APIs are launches too."""
    launches, now = launches_of(request), time.time()
    return JSONResponse([launches.describe(instance, now) for instance in launches.current()])


@router.get("/status/{launch_id}", response_model=models.Launch, responses=documented(404), summary="One launch")
async def status(request: Request, launch_id: str) -> Response:
    """Describe a launch, ended ones included."""
    launches = launches_of(request)
    return JSONResponse(launches.describe(launches.find(launch_id), time.time()))


@router.get(
    "/logs/{launch_id}", response_model=models.LaunchLog, responses=documented(404, 422), summary="Read a launch's log"
)
async def logs(
    request: Request,
    launch_id: str,
    offset: Annotated[int, Query(ge=0, description="the first byte; beyond the end means the end")] = 0,
) -> Response:
    """A piece of a launch's log, 1 MiB at most, or less where the daemon was told so; `next_offset` is where to go on,
    once there is more."""
    piece = launches_of(request).read_log(launch_id, offset)
    if len(piece.data) < LARGE_PIECE:
        return log_reply(launch_id, piece)
    return await asyncio.to_thread(log_reply, launch_id, piece)


def log_reply(launch_id: str, piece: Piece) -> Response:
    """A piece of a log as text."""
    document = {"offset": piece.offset, "next_offset": piece.next_offset, "content": piece.content}
    return JSONResponse({"launch_id": launch_id, **document})


@router.post("/stop/{launch_id}", response_model=models.Launch, responses=documented(404), summary="Stop a launch")
async def stop(request: Request, launch_id: str) -> Response:
    """Stop a launch within 5 s, whatever it is doing; its record and log stay. One that has ended stays as it is."""
    launches = launches_of(request)
    return JSONResponse(launches.describe(await launches.stop(launch_id), time.time()))


@router.get("/stats", response_model=models.Stats, summary="The host now")
async def stats(request: Request) -> Response:
    """Load, memory and GPUs of this host; what cannot be told is null, and the two errors say why."""
    host: HostStats = request.app.state.host_stats
    book = supervisor_of(request).fleet.roster.book()
    found = await host.read(lambda uuid: [claim.id for claim in book.on(uuid, Hold.AWAKE, Hold.COMING)])
    return JSONResponse({"collected_at": timestamp(time.time()), **found})
