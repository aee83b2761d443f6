"""The v1 API: one instance, a view of the one called ``default`` that it made itself."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from bullpen.core.instance import ENDED, Instance
from bullpen.core.public import status
from bullpen.errors import ConflictError, NotFoundError, StateError
from bullpen.node.supervisor import Supervisor
from bullpen.web import models
from bullpen.web.errors import documented
from bullpen.web.v2 import supervisor_of

router = APIRouter(prefix="/v1/vllm", tags=["v1: one instance"])

ID = "default"
FACE = "v1"
LAST_PID = "v1_last_pid"


def own_instance(supervisor: Supervisor) -> Instance | None:
    """The instance that v1 made, if it is there."""
    instance = supervisor.fleet.instances.get(ID)
    return instance if instance is not None and instance.listed and instance.config.face == FACE else None


def remember(supervisor: Supervisor, pid: int | None) -> None:
    """Keep the last pid for callers that ask after the instance has gone; None forgets it.

    Where the journal cannot be written the instance runs, or is gone, all the same.
    """
    with suppress(StateError):
        supervisor.resources.journal.set_fact(LAST_PID, pid)


@router.post("", response_model=models.V1Status, responses=documented(409, 422, 500), summary="Start the one instance")
async def start(request: Request, config: models.V1Config) -> Response:
    """Start the instance. One that has ended by itself makes room."""
    supervisor = supervisor_of(request)
    wanted = supervisor.read_config(**config.model_dump(), face=FACE)
    current = own_instance(supervisor)
    if current is not None and current.state not in ENDED:
        raise ConflictError(f"an instance is running already (pid {current.pid}); DELETE /v1/vllm first")
    if current is not None:
        await supervisor.check(wanted)  # what is refused must not cost the log of the one that has ended
        with suppress(NotFoundError):  # another caller was quicker; one of the creates will be refused
            await supervisor.stop(ID)
    instance = await supervisor.create(wanted, ID)
    remember(supervisor, instance.pid)
    return JSONResponse({"status": "started", "pid": instance.pid})


@router.delete("", response_model=models.V1Status, responses=documented(404, 500), summary="Stop the one instance")
async def stop(request: Request) -> Response:
    """Stop the instance. A body is read and ignored."""
    supervisor = supervisor_of(request)
    current = own_instance(supervisor)
    if current is None or current.state in ENDED:
        raise NotFoundError("no instance is running; POST /v1/vllm starts one")
    await supervisor.stop(ID)
    remember(supervisor, current.pid)
    return JSONResponse({"status": "terminated", "pid": current.pid})


@router.get("", response_model=models.V1Status, responses=documented(404), summary="The one instance")
async def get(request: Request) -> Response:
    """Say whether the instance runs, and its server process's pid."""
    supervisor = supervisor_of(request)
    current = own_instance(supervisor)
    if current is not None:
        word = "started" if status(current) == "running" else "stopped"
        return JSONResponse({"status": word, "pid": current.pid})
    last_pid = supervisor.resources.journal.fact(LAST_PID)
    if last_pid is None:
        raise NotFoundError("no instance was ever started; POST /v1/vllm starts one")
    return JSONResponse({"status": "stopped", "pid": last_pid})
