"""The gate around an ASGI application, as vLLM's `--middleware` puts it there."""

import asyncio
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from bullpen.gate.state import NOT_FOUND, PASS_HEADER, REFUSAL, WEBSOCKET, Entry, Gate, Reply, Ruling

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

TRY_AGAIN_LATER = 1013
"""The websocket close code of a refusal."""

_PASS = (PASS_HEADER.encode(), b"1")
_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
"""Headers of proxies. What comes through one is not from this machine, wherever the proxy runs and whatever address
the server makes of it."""
_SOMEWHERE = "somewhere else"
_LOOPBACK = "127.0.0.1"
_DISCONNECTS = ("http.disconnect", "websocket.disconnect")


class GateMiddleware:
    """Lets requests through a gate to an application.

    A request counts until the application has done with it: its answer is sent whole, or the application has noticed
    that the client has gone. Where the engine still works for a client that left, it is still counted.

    Args:
        app: the application behind the gate.
        gate: the gate; by default one as the process's environment asks for it.

    Raises:
        ValueError: a variable of the environment has a value that cannot be used.
    """

    def __init__(self, app: Application, gate: Gate | None = None) -> None:
        self._app = app
        self.gate = gate or Gate.from_environment(os.environ)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the application: a request, a websocket, or the lifespan, which passes as it is."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        method, path = scope.get("method", WEBSOCKET), _path(scope)
        ruling = self.gate.rule(method, path, _peer(scope), _PASS in scope["headers"])
        if ruling is Ruling.COUNTED:
            await self._enter(scope, receive, send)
        elif ruling is Ruling.FREE:
            await self._app(scope, receive, send)
        elif method == WEBSOCKET:
            await receive()
            await send({"type": "websocket.close"})  # before it was accepted: the client gets 403
        elif ruling is Ruling.OWN:
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            await _send_reply(send, self.gate.answer(method, path, query.get("mode", [None])[-1]))
        else:
            await _send_reply(send, NOT_FOUND)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a counted request on, at once or after it was held, or refuse it."""
        if self.gate.enter_at_once():
            await self._inside(scope, receive, send)
            return
        inbox = _Inbox(receive)
        watch = asyncio.ensure_future(inbox.watch())
        try:
            entry = await self.gate.enter(watch)
            if entry is Entry.ADMITTED:
                watch.cancel()
                await self._inside(scope, inbox.receive, send)
            elif entry is Entry.REFUSED:
                watch.cancel()
                await _refuse(scope, inbox.receive, send)
        finally:
            watch.cancel()
            inbox.close()

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            self.gate.leave()


class _Inbox:
    """What a held client sends: looked through for its leaving, and kept for the application."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._next: asyncio.Future[Message] | None = None

    async def watch(self) -> None:
        """Return when the client has left. Cancelling it loses no message."""
        while True:
            if self._next is None:
                self._next = asyncio.ensure_future(self._receive())
            message = await asyncio.shield(self._next)
            self._next = None
            self._kept.append(message)
            if message["type"] in _DISCONNECTS:
                return

    async def receive(self) -> Message:
        """The application's `receive`: first what was kept, then what comes."""
        if self._kept:
            return self._kept.popleft()
        if self._next is not None:
            coming, self._next = self._next, None
            return await coming
        return await self._receive()

    def close(self) -> None:
        """Ask for nothing any more."""
        if self._next is not None:
            self._next.cancel()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await _send_reply(send, REFUSAL)
        return
    if (await receive())["type"] == "websocket.connect":
        # A close code reaches only a client whose connection was accepted.
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": "Try again later"})


async def _send_reply(send: Send, reply: Reply) -> None:
    body = json.dumps(reply.content).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
    packed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": packed})
    await send({"type": "http.response.body", "body": body})


def _peer(scope: Scope) -> str | None:
    """The address that a request comes from, None for a Unix socket; this machine's own calls count as loopback."""
    if any(name.lower() in _FORWARDED for name, _ in scope["headers"]):
        return _SOMEWHERE
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return None
    # A server that listens on one of the host's other addresses is called from that address.
    own = server is not None and server[1] is not None and client[0] == server[0]
    return _LOOPBACK if own else str(client[0])


def _path(scope: Scope) -> str:
    """The path as the application's own routes see it: without the prefix under which it is served."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path") or "")
