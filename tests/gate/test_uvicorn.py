"""The gate inside a real server, over real connections; and against the installed vLLM's routes."""

import asyncio
import importlib.util
import re
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvicorn

from bullpen.gate.asgi import GateMiddleware, Receive, Scope, Send
from bullpen.gate.state import DEVELOPMENT_PATHS
from tests.gate.client import DEADLINE_SECONDS

BODY = b"x" * 300_000


class Slow:
    """Answers with the size of what it got, piece by piece, when it may go on."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self.asked += 1
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode(), "more_body": True})
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b" bytes"})


async def test_a_server_with_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULLPEN_GATE_HOLD_SECONDS", "30")
    application = Slow()
    middleware = GateMiddleware(application)
    gate = middleware.gate
    server = uvicorn.Server(uvicorn.Config(middleware, lifespan="off", log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_SECONDS, trust_env=False) as client:
                assert (await client.post("/bullpen/gate?mode=hold")).json()["mode"] == "hold"
                held = asyncio.create_task(client.post("/v1/completions", content=BODY))
                await until_sleeping(lambda: gate.document()["held"] == 1)
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", content=BODY, timeout=0.2)
                await until_sleeping(lambda: gate.document()["held"] == 1)
                assert application.asked == 0

                assert (await client.post("/bullpen/gate?mode=open")).status_code == 200
                await until_sleeping(lambda: application.asked == 1)
                document = (await client.get("/bullpen/gate")).json()
                assert (document["in_flight"], document["held"], document["idle_seconds"]) == (1, 0, 0)
                application.go_on.set()
                assert (await held).content == b"300000 bytes"
                await until_sleeping(lambda: gate.document()["in_flight"] == 0)

                await client.post("/bullpen/gate?mode=refuse")
                refused = await client.post("/v1/completions", content=BODY)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
                passed = await client.post("/v1/completions", content=b"x", headers={"X-Bullpen-Pass": "1"})
                assert passed.content == b"1 bytes"
                # What a proxy on this machine forwards for a caller elsewhere is that caller's.
                elsewhere = await client.get("/bullpen/gate", headers={"X-Forwarded-For": "10.0.0.1"})
                assert elsewhere.status_code == 404
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, DEADLINE_SECONDS)


async def until_sleeping(true: Callable[[], bool]) -> None:
    """As `until`, but leaves the processor to the server in between."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not true():
            await asyncio.sleep(0.005)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's source")
def test_every_development_endpoint_of_the_installed_vllm_is_known() -> None:
    specification = importlib.util.find_spec("vllm")
    assert specification and specification.submodule_search_locations
    entrypoints = Path(specification.submodule_search_locations[0]) / "entrypoints"
    sources = [file.read_text() for folder in ("serve/dev", "rl") for file in (entrypoints / folder).rglob("*.py")]
    routes = {path for source in sources for path in re.findall(r'@router\.\w+\(\s*"([^"]+)"', source)}
    assert "/sleep" in routes
    assert routes <= DEVELOPMENT_PATHS
