"""A box that answers the launches' REST API from memory, for tests that need no daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from bullpen.client import wire

URL = "http://box:8000"
AT = "2026-01-01T00:00:00.000001Z"


class Box:
    """What it was asked is in `calls`; what is put into `troubles` is answered, or raised, instead of the next answers.

    `log` is the log of each launch, `url` that of each one's own server.

    Args:
        has_watch: it tells of changes, as Bullpen does and the original did not.
    """

    def __init__(self, has_watch: bool = True) -> None:
        self.calls: list[str] = []
        self.bodies: list[Any] = []
        self.troubles: list[httpx.Response | Exception] = []
        self.launches: dict[str, dict[str, Any]] = {}
        self.log = ""
        self.url: str | None = None
        self.pid: int | None = None
        self.watchers: list[asyncio.Queue[bytes]] = []
        self.after_call: Callable[[str], object] = lambda _: None
        self.has_watch = has_watch

    @property
    def transport(self) -> httpx.MockTransport:
        """What a client is given."""
        return httpx.MockTransport(self._answer)

    def become(self, launch_id: str = "one", **changes: Any) -> None:
        """Change a launch, and tell the watchers."""
        self.launches[launch_id].update(changes)
        self.tell(launch_id)

    def tell(self, launch_id: str) -> None:
        """Tell the watchers that a launch has changed."""
        event = {"type": "STATE", "object": {"instance_id": f"i-{launch_id}", "revision": 1}}
        for watcher in self.watchers:
            watcher.put_nowait(json.dumps(event).encode() + b"\n")

    def end_watches(self) -> None:
        """End all watches, as a daemon does that ends."""
        for watcher in self.watchers:
            watcher.put_nowait(b"")

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)  # as every answer of a network
        call = f"{request.method} {request.url.raw_path.decode()}"
        self.calls.append(call)
        self.bodies.append(json.loads(request.content) if request.content else None)
        if self.troubles:
            trouble = self.troubles.pop(0)
            if isinstance(trouble, Exception):
                raise trouble
            return trouble
        answer = self._route(request.method, request.url.path, request)
        self.after_call(call)
        return answer

    def _route(self, method: str, path: str, request: httpx.Request) -> httpx.Response:
        _, verb, *rest = path.split("/")
        if path == wire.WATCH and self.has_watch:
            return httpx.Response(200, stream=Watch(self))
        if path == f"{wire.INSTANCES}/i-one":
            server = {"url": self.url, "pid": self.pid, "served_model_names": ["test/model"]}
            return httpx.Response(200, json={"instance_id": "i-one", **server})
        if path == "/launch" and method == "POST":
            self.launches["one"] = new_launch(json.loads(request.content))
            return httpx.Response(201, json=self.launches["one"])
        if path == "/launch":
            return httpx.Response(200, json=list(self.launches.values()))
        if rest and rest[0] not in self.launches:
            return httpx.Response(404, json={"detail": f"Unknown launch_id: {rest[0]}"})
        if verb == "logs":
            offset = int(request.url.params["offset"])
            content = self.log[offset : offset + 3]
            piece = {"launch_id": rest[0], "offset": offset, "next_offset": offset + len(content), "content": content}
            return httpx.Response(200, json=piece)
        if verb == "stop":
            self.become(rest[0], state="stopped")
        if verb in ("status", "stop"):
            return httpx.Response(200, json=self.launches[rest[0]])
        return httpx.Response(404, json={"detail": "Not Found"})


class Watch(httpx.AsyncByteStream):
    """One watcher's lines: first one for each launch there is, then what the box tells."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        box.watchers.append(self._lines)
        for launch_id in box.launches:
            box.tell(launch_id)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self._lines.get():
            yield line

    async def aclose(self) -> None:
        self._box.watchers.remove(self._lines)


def new_launch(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A launch that was just asked for."""
    return {
        "launch_id": "one",
        "model": body["model"],
        "gpu_ids": body.get("gpu_ids") or [0],
        "task": body["task"],
        "state": "bootstrapping",
        "created_at": AT,
        "updated_at": AT,
        "error": None,
        "instance_id": "i-one",
        "phase": "load",
        "progress": 0.25,
        "remaining_seconds": 3.0,
        "of_a_newer_daemon": 1,
        **changes,
    }
