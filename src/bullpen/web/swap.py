"""The v2 API: swap, and the GPUs that swaps are about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from bullpen.core.instance import Config, Instance
from bullpen.errors import InvalidRequestError
from bullpen.node.supervisor import Supervisor
from bullpen.web import sleep_models
from bullpen.web.errors import documented
from bullpen.web.v2 import supervisor_of

router = APIRouter(prefix="/v2/vllm", tags=["v2: sleep and swap"])


@router.post(
    "/swap",
    response_model=sleep_models.Swapped,
    responses=documented(404, 409, 422, 500),
    summary="Have one instance ready in the place of others",
)
async def swap(request: Request, wanted: sleep_models.SwapRequest) -> Response:
    """Let some instances sleep and have another one ready in their place, or have all as it was before.

    The reply comes when what came in is ready. A swap that fails is taken back first, and the error says how things are
    then. Progress comes as events of type SWAP (`events=all`).
    """
    supervisor = supervisor_of(request)
    incoming, instance_id = read_incoming(supervisor, wanted)
    try:
        instance, done = await supervisor.swap(
            incoming,
            wanted.outgoing,
            instance_id=instance_id,
            level=wanted.sleep_level,
            drain=wanted.drain,
            refuse=wanted.new_requests == "refuse",
        )
    except InvalidRequestError as problem:
        raise placed(problem, wanted) from problem
    return JSONResponse(swapped(supervisor, instance, done))


def read_incoming(supervisor: Supervisor, wanted: sleep_models.SwapRequest) -> tuple[str | Config, str | None]:
    """What comes in, by id or as a configuration with an id.

    Raises:
        InvalidRequestError: a field can never work.
    """
    if isinstance(wanted.incoming, str):
        return wanted.incoming, None
    try:
        config = supervisor.read_config(**wanted.incoming.model_dump(exclude={"instance_id"}))
    except InvalidRequestError as problem:
        raise placed(problem, wanted) from problem
    return config, wanted.incoming.instance_id


def placed(problem: InvalidRequestError, wanted: sleep_models.SwapRequest) -> InvalidRequestError:
    """The problem with its place in the body of a swap."""
    if isinstance(wanted.incoming, str) or problem.field not in sleep_models.NewInstance.model_fields:
        return problem
    return InvalidRequestError(str(problem), field=f"in.{problem.field}", kind=problem.kind)


def swapped(supervisor: Supervisor, instance: Instance, done: Mapping[str, Any]) -> dict[str, Any]:
    """A swap as JSON data; what went out and was deleted since is left out."""
    known = supervisor.fleet.instances
    return {
        "swap": done["swap"],
        "in": supervisor.describe(instance),
        "out": [supervisor.describe(known[one]) for one in done["out"] if one in known],
        "seconds": done["stages"]["done"],
        "stages": done["stages"],
    }


@router.get("/gpus", response_model=sleep_models.GpuReport, summary="All GPUs and who has them")
async def gpus(request: Request) -> Response:
    """GPUs by index, with their memory, who is awake, coming or asleep there, and processes that are no instance's."""
    return JSONResponse(await supervisor_of(request).gpu_report())
