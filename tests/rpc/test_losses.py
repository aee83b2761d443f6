"""Servers that are lost: what callers are told is what happened."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import grpc
import pytest

from bullpen.engines.postmortem import ENGINE_DIED
from bullpen.proto import bootstrap, v1
from bullpen.rpc import connections
from tests.rpc.engine import Asked, scripted
from tests.rpc.serving import Rpc, refused, serving

Code = grpc.StatusCode


def calls(rpc: Rpc) -> tuple[object, object]:
    """The same request to both services."""
    return (
        rpc.complete(bootstrap.CompleteRequest(launch_id="gen", prompts=["x"])),
        rpc.complete_v1(v1.CompleteRequest(instance_id="gen", prompts=["x"])),
    )


@pytest.fixture
def full() -> Iterator[int]:
    """The port of a server that takes no more connections, as its queue of them is full."""
    waiting = [socket.socket() for _ in range(4)]
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        for other in waiting:
            other.setblocking(False)
            other.connect_ex(server.getsockname())
        yield server.getsockname()[1]
    for other in waiting:
        other.close()


async def test_a_server_that_takes_no_connection_has_not_crashed(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.2)
    async with serving() as rpc:
        rpc.book.add("gen", full)
        first, second = calls(rpc)
        said = "gen does not answer: it took no connection within "
        code, details = await refused(first)
        assert code is Code.UNAVAILABLE and details.startswith(f"Launch {said}")
        code, details = await refused(second)
        assert code is Code.UNAVAILABLE and details.startswith(f"Instance {said}")


async def test_a_server_whose_engine_died() -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"error": {"message": f"{ENGINE_DIED} See stack trace", "code": 500}}, 500)

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        first, second = calls(rpc)
        assert await refused(first) == (Code.FAILED_PRECONDITION, "Launch gen subprocess crashed")
        told = "Instance gen does not answer: its engine has died; its log may say why"
        assert await refused(second) == (Code.UNAVAILABLE, told)
