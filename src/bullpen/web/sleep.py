"""The v2 API: sleep and wake of an instance, what works of it, and why it is as it is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from bullpen.web import models, sleep_models
from bullpen.web.errors import documented
from bullpen.web.v2 import supervisor_of

router = APIRouter(prefix="/v2/vllm/instances/{instance_id}", tags=["v2: sleep and swap"])


@router.post(
    "/sleep",
    response_model=models.Instance,
    responses=documented(404, 409, 422, 500),
    summary="Put an instance to sleep",
)
async def sleep(request: Request, instance_id: str, how: Annotated[sleep_models.SleepQuery, Query()]) -> Response:
    """Let requests in flight end, then have the instance sleep; it does when the reply comes.

    One that sleeps at least so deep already is left alone.
    """
    supervisor = supervisor_of(request)
    instance = await supervisor.sleep(instance_id, how.level, how.drain, how.new_requests == "refuse")
    return JSONResponse(supervisor.describe(instance))


@router.post(
    "/wake",
    response_model=models.Instance,
    responses=documented(404, 409, 422, 500),
    summary="Have an instance ready",
)
async def wake(request: Request, instance_id: str) -> Response:
    """Wake an instance that sleeps, start one that was stopped or has failed; it is ready when the reply comes."""
    supervisor = supervisor_of(request)
    return JSONResponse(supervisor.describe(await supervisor.wake(instance_id)))


@router.post(
    "/verdicts",
    response_model=sleep_models.Verdicts,
    responses=documented(404, 409, 422, 500),
    summary="Tell whether a level of sleep works",
)
async def judge(request: Request, instance_id: str, found: sleep_models.NewVerdict) -> Response:
    """Remember for the instance's model, engine and GPU what somebody found out; the ladder leaves out what fails.

    It counts like what Bullpen sees itself: the last word about a level is the one that is kept.
    """
    verdicts = await supervisor_of(request).judge(instance_id, found.level, works=found.works, why=found.why)
    return JSONResponse(verdicts)


@router.get(
    "/explain",
    response_model=sleep_models.Explanation,
    responses=documented(404),
    summary="Why an instance is as it is",
)
async def explain(request: Request, instance_id: str) -> Response:
    """What was decided about an instance and why, what it waits for, and what happens to it next."""
    return JSONResponse(supervisor_of(request).explain(instance_id))
