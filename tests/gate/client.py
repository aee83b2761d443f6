"""A tiny ASGI application and a hand that drives it through the gate, without a server."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bullpen.gate.asgi import GateMiddleware, Message, Receive, Scope, Send
from bullpen.gate.state import Gate

DEADLINE_SECONDS = 10.0


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop run until something is true; fail when that takes too long."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not true():
            await asyncio.sleep(0)


class Application:
    """Echoes a request's body when it is told to go on, in two pieces; notes what it was asked."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.served: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.served.append("lifespan")
            return
        self.served.append(scope["path"])
        if scope["type"] == "websocket":
            assert (await receive())["type"] == "websocket.connect"
            await send({"type": "websocket.accept"})
            await self.go_on.wait()
            await send({"type": "websocket.close", "code": 1000})
            return
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request", message
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/error":
            raise RuntimeError("the application fails")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"!"})


@dataclass
class Call:
    """One request under way: what was sent to it so far, and how to send it more."""

    task: asyncio.Task[None]
    inbox: asyncio.Queue[Message]
    sent: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    async def ended(self) -> "Call":
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.task
        return self


class House:
    """An application behind a gate."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.application = Application()
        self.gate = gate or Gate()
        self.middleware = GateMiddleware(self.application, self.gate)

    @property
    def counts(self) -> tuple[object, object]:
        """Who is inside, and who is held."""
        document = self.gate.document()
        return document["in_flight"], document["held"]

    def call(
        self,
        method: str = "POST",
        path: str = "/v1/completions",
        *,
        query: str = "",
        peer: str | None = "10.1.2.3",
        headers: dict[str, str] | None = None,
        body: tuple[bytes, ...] = (b"hi",),
        root_path: str = "",
    ) -> Call:
        """Begin a request whose body comes in these pieces; none at all leaves the client silent."""
        scope: Scope = {
            "type": "http",
            "method": method,
            "path": path,
            "root_path": root_path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": (peer, 50000) if peer is not None else None,
            "server": ("192.0.2.2", 8000) if peer is not None else ("/run/server.sock", None),
        }
        messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
        if messages:
            messages[-1]["more_body"] = False
        return self._begin(scope, messages)

    def websocket(self, peer: str = "10.1.2.3", path: str = "/v1/realtime") -> Call:
        """Begin a websocket."""
        scope: Scope = {"type": "websocket", "path": path, "headers": [], "client": (peer, 50000)}
        return self._begin(scope, [{"type": "websocket.connect"}])

    async def ask(self, method: str, path: str, **more: Any) -> Call:
        """A request that ends by itself."""
        return await self.call(method, path, **more).ended()

    def _begin(self, scope: Scope, messages: list[Message]) -> Call:
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            inbox.put_nowait(message)
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        return Call(asyncio.create_task(self.middleware(scope, inbox.get, send)), inbox, sent)
