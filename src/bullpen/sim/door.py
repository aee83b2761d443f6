"""The gate in the simulator's request handler: who counts, who waits, who is refused."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from bullpen.gate.state import NOT_FOUND, PASS_HEADER, REFUSAL, Entry, Gate, Reply, Ruling
from bullpen.sim.http import Request, Response, Stream


class Door:
    """Lets requests through a gate to a handler; an instance is what an HTTP server calls."""

    def __init__(self, gate: Gate, handler: Callable[[Request], Awaitable[Response | Stream]]) -> None:
        self._gate = gate
        self._handler = handler

    @asynccontextmanager
    async def __call__(self, request: Request) -> AsyncIterator[Response | Stream]:
        """The answer to a request, which counts until the context ends."""
        has_pass = request.headers.get(PASS_HEADER) == "1"
        ruling = self._gate.rule(request.method, request.path, request.client, has_pass)
        if ruling is Ruling.OWN:
            mode = request.query.get("mode", [""])[-1]
            yield _response(self._gate.answer(request.method, request.path, mode or None))
        elif ruling is Ruling.ABSENT:
            yield _response(NOT_FOUND)
        elif ruling is Ruling.FREE:
            yield await self._handler(request)
        elif await self._gate.enter() is Entry.ADMITTED:  # a client that leaves meanwhile cancels this
            try:
                yield await self._handler(request)
            finally:
                self._gate.leave()
        else:
            yield _response(REFUSAL)


def _response(reply: Reply) -> Response:
    return Response(reply.status, json.dumps(reply.content).encode(), "application/json", dict(reply.headers))
