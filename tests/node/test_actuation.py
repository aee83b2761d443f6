"""What a step of sleep leaves behind where the server fails in the middle of it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Address, Config, Instance
from bullpen.node.actuation import Actuation

OPERATION = 7


async def drain_of(answers: list[tuple[int, int]]) -> tuple[ev.Event, list[str]]:
    """Drain a server whose gate gives these answers (status, requests in flight), one after the other; what came of it,
    and what the gate was asked."""
    asked: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(" ".join(head.decode().split()[:2]))
        status, in_flight = answers.pop(0)
        body = json.dumps({"mode": "hold", "in_flight": in_flight, "held": 0, "idle_seconds": 3.0}).encode()
        writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    instance = Instance("x", "x", Config("", (), engine="sim"), created_at=0.0)
    instance.address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    told: list[ev.Event] = []
    fleet = cast(Any, SimpleNamespace(instances={"x": instance}))
    try:
        await Actuation(fleet, cast(Any, None), told.append).step(fx.Drain("x", OPERATION, seconds=20.0, refuse=False))
    finally:
        server.close()
    (event,) = told
    return event, asked


async def test_a_drain_leaves_the_gate_closed() -> None:
    event, asked = await drain_of([(200, 1), (200, 1), (200, 0)])
    assert event == ev.Drained("x", OPERATION, 0, 3.0)
    assert asked == ["POST /bullpen/gate?mode=hold", "GET /bullpen/gate", "GET /bullpen/gate"]


async def test_a_drain_that_fails_opens_the_gate_again() -> None:
    event, asked = await drain_of([(200, 1), (500, 0), (200, 0)])
    assert isinstance(event, ev.EngineFailed)
    assert not event.touched
    assert asked[-1] == "POST /bullpen/gate?mode=open"
