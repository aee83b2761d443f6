"""The least that a daemon with this web framework can cost: one route, no state. Bullpen's is measured beside it."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse

app = FastAPI()


@app.get("/health")
async def health() -> JSONResponse:
    """Answer."""
    return JSONResponse({"status": "OK"})
