"""The v2 API: many instances, by id."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bullpen.core.public import status
from bullpen.node.logs import MAX_CHUNK
from bullpen.node.supervisor import Supervisor
from bullpen.web import models
from bullpen.web.errors import documented

router = APIRouter(prefix="/v2/vllm/instances", tags=["v2: many instances"])

RANGE = re.compile(r"bytes=([0-9]{1,100})-([0-9]{0,100})", re.IGNORECASE)
BINARY: dict[str, Any] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
LINES: dict[str, Any] = {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def supervisor_of(request: Request) -> Supervisor:
    """The supervisor that the app serves."""
    supervisor: Supervisor = request.app.state.supervisor
    return supervisor


async def create(request: Request, config: models.VllmConfig, instance_id: str | None = None) -> Response:
    """Create an instance and describe it."""
    supervisor = supervisor_of(request)
    instance = await supervisor.create(supervisor.read_config(**config.model_dump()), instance_id)
    return JSONResponse(supervisor.describe(instance, "started"), 201)


@router.post(
    "",
    status_code=201,
    response_model=models.Instance,
    responses=documented(409, 422, 500),
    summary="Create an instance with an id of Bullpen's choice",
)
async def create_instance(request: Request, config: models.VllmConfig) -> Response:
    """Create an instance. The reply comes when its process runs, not when it is ready: see `state`, or the watch.

    While the engine is still being imported, the call waits for that.
    """
    return await create(request, config)


@router.get(
    "", response_model=models.InstanceList | models.InstanceIds, responses=documented(422), summary="List instances"
)
async def list_instances(request: Request, detail: bool = True) -> Response:
    """List all instances, with details or (`detail=False`) by id alone."""
    supervisor = supervisor_of(request)
    fleet = supervisor.fleet
    instances = fleet.listed()
    if not detail:
        ids = [instance.id for instance in instances]
        return JSONResponse({"revision": fleet.revision, "instance_ids": ids, "count": len(ids)})
    return JSONResponse(
        {
            "revision": fleet.revision,
            "total_instances": len(instances),
            "running_instances": sum(status(instance) == "running" for instance in instances),
            "instances": [supervisor.describe(instance) for instance in instances],
        }
    )


@router.delete("", response_model=models.AllStopped, responses=documented(500), summary="Stop and remove all instances")
async def delete_all_instances(request: Request) -> Response:
    """Stop all instances side by side, and remove them."""
    supervisor = supervisor_of(request)
    stopped = [supervisor.describe(instance, word) for instance, word in await supervisor.stop_all()]
    return JSONResponse({"status": "all_stopped", "stopped_instances": stopped, "total_stopped": len(stopped)})


@router.get(
    "/watch", responses={200: LINES, **documented(410, 422)}, response_class=Response, summary="Watch instances"
)
async def watch_instances(
    request: Request,
    since: Annotated[
        str | None, Query(description="a revision; only what happened after it", pattern="^[0-9]{1,100}$")
    ] = None,
    events: Annotated[Literal["all"] | None, Query(description="`all`: finer events and heartbeats too")] = None,
) -> Response:
    """Events as lines of JSON, until the caller leaves: CREATED, STOPPED, DELETED, each with its revision.

    Without `since`, it begins with a CREATED for every instance there is. With `events=all` there is a STATE for every
    change of an instance, a SWAP for every stage of a swap, and a HEARTBEAT every 15 s.
    """
    stream = supervisor_of(request).watch(None if since is None else int(since), fine=events == "all")
    return StreamingResponse(stream, media_type="application/x-ndjson", headers=STREAM_HEADERS)


@router.put(
    "/{instance_id}",
    status_code=201,
    response_model=models.Instance,
    responses=documented(409, 422, 500),
    summary="Create an instance with an id of your choice",
)
async def create_named_instance(request: Request, instance_id: str, config: models.VllmConfig) -> Response:
    """Create an instance under the given id. It is no update: where the id exists, the answer is 409."""
    return await create(request, config, instance_id)


@router.get("/{instance_id}", response_model=models.Instance, responses=documented(404), summary="One instance")
async def get_instance(request: Request, instance_id: str) -> Response:
    """Describe one instance."""
    supervisor = supervisor_of(request)
    return JSONResponse(supervisor.describe(supervisor.fleet.get(instance_id)))


@router.delete(
    "/{instance_id}",
    response_model=models.Instance,
    responses=documented(404, 500),
    summary="Stop and remove an instance",
)
async def delete_instance(request: Request, instance_id: str) -> Response:
    """Stop an instance and remove it. When the reply comes, no process of it is left."""
    supervisor = supervisor_of(request)
    instance, word = await supervisor.stop(instance_id)
    return JSONResponse(supervisor.describe(instance, word))


@router.get(
    "/{instance_id}/log",
    responses={200: BINARY, 206: BINARY, **documented(400, 404), 416: {"description": "the log is not that long"}},
    response_class=Response,
    summary="Read an instance's log",
)
async def get_instance_log(
    request: Request,
    instance_id: str,
    range_header: Annotated[str | None, Header(alias="Range", description="`bytes=A-B` or `bytes=A-`")] = None,
    follow: Annotated[bool, Query(description="keep the connection open and send what is written from now on")] = False,
) -> Response:
    """The log's bytes, 1 MiB a reply at most; `Content-Range` says which ones, and how many there are.

    With `follow=true`, all of it from `A` on and then what is written, until the server ends.
    """
    supervisor = supervisor_of(request)
    supervisor.fleet.get(instance_id)
    first, last = 0, None
    if range_header is not None:
        match = RANGE.fullmatch(range_header.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            return JSONResponse({"detail": "Range must be bytes=A-B or bytes=A-, one range, A not above B"}, 400)
        first, last = int(match[1]), int(match[2]) if match[2] else None
    if follow:
        stream = supervisor.follow_log(instance_id, first)
        return StreamingResponse(stream, media_type="application/octet-stream", headers=STREAM_HEADERS)
    return log_reply(supervisor, instance_id, first, last, ranged=range_header is not None)


def log_reply(supervisor: Supervisor, instance_id: str, first: int, last: int | None, *, ranged: bool) -> Response:
    """One piece of a log; ``last`` is inclusive, as in the header."""
    end = first + MAX_CHUNK if last is None else min(last + 1, first + MAX_CHUNK)
    chunk = supervisor.read_log(instance_id, first, end if ranged else None)
    if not ranged:
        return Response(chunk.data, media_type="application/octet-stream")
    if first >= chunk.total:
        return Response(b"", 416, {"Content-Range": f"bytes */{chunk.total}"}, "application/octet-stream")
    if not chunk.data:  # what was asked for lies wholly in the part that the cap has dropped
        chunk = supervisor.read_log(instance_id, first, None)
    sent = f"bytes {chunk.start}-{chunk.start + len(chunk.data) - 1}/{chunk.total}"
    return Response(chunk.data, 206, {"Content-Range": sent}, "application/octet-stream")
