"""Bullpen's errors as HTTP replies, in the shape that FastAPI's users know: ``{"detail": …}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from bullpen.errors import BullpenError, ConflictError, InvalidRequestError, LaunchRefusedError, NotFoundError
from bullpen.node.bus import RevisionGoneError
from bullpen.web import models

STATUS: Mapping[type[BullpenError], int] = {
    LaunchRefusedError: 400,
    ConflictError: 409,
    NotFoundError: 404,
    RevisionGoneError: 410,
}
"""An `InvalidRequestError` is 422, with its place; all others are 500: `LaunchError`, `EngineError`, `StuckError`, …"""

MEANING = {
    400: "the request cannot be read, or asks for what this host does not have",
    404: "there is no such instance",
    409: "id, port or GPU belongs to another instance, which is named; or it is busy, or cannot do that",
    410: "the events after that revision are not kept any more, or have not happened",
    416: "the log is not that long",
    422: "the request can never work; what is wrong with it is named, never quoted",
    500: "no process could be made or ended, or the engine did not do it: the text says how things are now",
}


def install(app: FastAPI) -> None:
    """Let an app answer with these errors."""
    app.add_exception_handler(BullpenError, on_bullpen_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


async def on_bullpen_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with the error's own sentence."""
    if isinstance(error, InvalidRequestError):
        location = ["path" if error.field in request.path_params else "body", *error.field.split(".")]
        return problems([{"type": error.kind, "loc": location, "msg": str(error)}])
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"detail": str(error)}, status)


async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with what is wrong and where, never with the input: it may hold a secret, or no valid Unicode."""
    assert isinstance(error, RequestValidationError)
    return problems(error.errors())


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer as FastAPI does, but for a body that its JSON reader chokes on: that is a bad body like any other."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and error.__cause__ is not None:
        return problems([{"type": "json_invalid", "loc": ["body"], "msg": "the body cannot be read as JSON"}])
    return await http_exception_handler(request, error)


def problems(found: Sequence[Mapping[str, Any]]) -> JSONResponse:
    """A 422 with these three facts of each problem; names in ``loc`` come from the request and may be any text."""
    detail = [
        {
            "type": one["type"],
            "loc": [part if isinstance(part, int) else plain(str(part)) for part in one["loc"]],
            "msg": plain(str(one["msg"])),
        }
        for one in found
    ]
    return JSONResponse({"detail": detail}, 422)


def plain(text: str) -> str:
    """Text that can be sent: what is no valid Unicode is written as an escape, and it is not endless."""
    return text.encode("utf-8", "backslashreplace").decode()[:1000]


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The error replies of a route, for the OpenAPI document."""
    return {
        code: {"model": models.Problems if code == 422 else models.Detail, "description": MEANING[code]}
        for code in codes
    }
