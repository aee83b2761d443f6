"""How long a request's body may be. It is in memory as a whole before anybody looks at it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 64 * 1024 * 1024
TOO_LONG = (
    f"the body is too long: {MOST_BYTES >> 20} MiB is the most; put long values into files that the daemon can read"
)


class BodyLimit:
    """ASGI middleware that refuses what is longer, by its `Content-Length` or as it comes.

    Args:
        app: what it guards.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or have the reader of its body end with 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        left = MOST_BYTES

        async def limited() -> Message:
            nonlocal left
            if said.isdecimal() and int(said) > MOST_BYTES:
                raise HTTPException(413, TOO_LONG)
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, TOO_LONG)
            return message

        await self._app(scope, limited, send)
