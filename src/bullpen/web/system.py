"""What is asked of the daemon itself: is it alive, can it launch, what is it."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from bullpen.web import models
from bullpen.web.v2 import supervisor_of

router = APIRouter(tags=["the daemon"])

INDEX = {
    "name": "Multi-Instance vLLM Management API",
    "version": "2.0",
    "endpoints": {
        "index": "GET /",
        "health": "GET /health",
        "ready": "GET /ready",
        "create_instance": "POST /v2/vllm/instances",
        "create_named_instance": "PUT /v2/vllm/instances/{instance_id}",
        "delete_instance": "DELETE /v2/vllm/instances/{instance_id}",
        "delete_all_instances": "DELETE /v2/vllm/instances",
        "get_instance_status": "GET /v2/vllm/instances/{instance_id}",
        "get_all_instances": "GET /v2/vllm/instances",
        "get_instance_logs": "GET /v2/vllm/instances/{instance_id}/log",
        "watch_instances": "GET /v2/vllm/instances/watch",
        "sleep_instance": "POST /v2/vllm/instances/{instance_id}/sleep",
        "wake_instance": "POST /v2/vllm/instances/{instance_id}/wake",
        "explain_instance": "GET /v2/vllm/instances/{instance_id}/explain",
        "judge_instance": "POST /v2/vllm/instances/{instance_id}/verdicts",
        "swap": "POST /v2/vllm/swap",
        "gpus": "GET /v2/vllm/gpus",
        "launch": "POST /launch",
        "list_launches": "GET /launch",
        "launch_status": "GET /status/{launch_id}",
        "launch_logs": "GET /logs/{launch_id}",
        "stop_launch": "POST /stop/{launch_id}",
        "stats": "GET /stats",
        "v1_start": "POST /v1/vllm",
        "v1_stop": "DELETE /v1/vllm",
        "v1_status": "GET /v1/vllm",
        "openapi": "GET /openapi.json",
    },
}


@router.get("/", summary="What this is; a browser gets the page")
async def index(request: Request) -> Response:
    """The name, the version, the endpoints, and the port of gRPC, null where that is off."""
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(resources.files("bullpen.web").joinpath("page.html").read_text(encoding="utf-8"))
    return JSONResponse({**INDEX, "grpc_port": request.app.state.grpc_port()})


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The API as a page, made in the browser from the OpenAPI document."""
    return HTMLResponse(resources.files("bullpen.web").joinpath("docs.html").read_text(encoding="utf-8"))


@router.get("/health", response_model=models.Health, summary="The daemon lives, whatever its instances do")
async def health() -> Response:
    """Answer anyone."""
    return JSONResponse({"status": "OK"})


@router.get(
    "/ready",
    response_model=models.Readiness,
    responses={503: {"model": models.Readiness, "description": "the engine is being imported, or cannot be"}},
    summary="The daemon can launch: its warm parent is up",
)
async def ready(request: Request) -> Response:
    """Answer anyone; say how far each zygote is, and where gRPC is, to those who may know."""
    readiness = supervisor_of(request).readiness()
    everything = {**readiness, "grpc_port": request.app.state.grpc_port()}
    shown = everything if request.scope.get("bullpen_admin") else {"ready": readiness["ready"]}
    return JSONResponse(shown, 200 if readiness["ready"] else 503)
