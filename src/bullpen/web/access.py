"""Who may call. The daemon starts programs, so this is decided before anything else looks at a request.

==================== ============================ ===========================================================
a key is set         caller                       answer
==================== ============================ ===========================================================
yes                  with the key                 served (loopback or not)
yes                  without, or a wrong one      401 with a challenge
no                   loopback, Host and Origin    served
                     are this host's own
no                   loopback, others             403: a web page must not drive the daemon
no                   remote, or behind a proxy    403, unless ``--allow-unauthenticated``
==================== ============================ ===========================================================

``/health`` and ``/ready`` answer anyone, and say nothing more.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bullpen.access import REMOTE, has_key, is_key, is_loopback, is_proxied

OPEN_PATHS = frozenset({"/health", "/ready"})
LOCAL_NAMES = frozenset({"localhost", "ip6-localhost", "localhost.localdomain"})

UNAUTHORIZED = (
    "Unauthorized: this daemon needs its access key: send `Authorization: Bearer KEY`, `X-API-Key: KEY`, or HTTP Basic"
    " with the key as password"
)
FORGED = "Host or Origin names another host; without an access key only this host's own programs are answered"


class Access:
    """ASGI middleware that keeps out who may not call.

    Args:
        app: what it guards.
        key: the admin key; None where there is none.
        allow_unauthenticated: answer remote callers although there is no key.
    """

    def __init__(self, app: ASGIApp, key: str | None, allow_unauthenticated: bool) -> None:
        self._app = app
        self._key = key.encode() if key else None
        self._open = allow_unauthenticated

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        scope["bullpen_admin"] = refusal is None
        if refusal is None or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        await refuse(send, *refusal)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is not served: status and sentence."""
        headers = Headers(scope=scope)
        if self._key is not None:
            authorization, given = (headers.get(name, "").encode("latin-1") for name in ("authorization", "x-api-key"))
            return None if has_key(authorization, self._key) or is_key(given, self._key) else (401, UNAUTHORIZED)
        if self._open:
            return None
        peer = (scope.get("client") or ("", 0))[0]
        if is_proxied(headers.keys()) or (peer and not is_loopback(peer)):  # a Unix socket has no address
            return 403, REMOTE
        origin = headers.get("origin")
        local = is_local_authority(headers.get("host", "")) and (origin is None or is_local_origin(origin))
        return None if local else (403, FORGED)


async def refuse(send: Send, status: int, detail: str) -> None:
    """Answer with an error before the body is read."""
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="bullpen", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_local_authority(authority: str) -> bool:
    """Whether a ``Host`` names this host."""
    try:
        name = urlsplit(f"//{authority}").hostname
    except ValueError:
        return False
    return "@" not in authority and name is not None and (name in LOCAL_NAMES or is_loopback(name))


def is_local_origin(origin: str) -> bool:
    """Whether an ``Origin`` is a page of this host."""
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and is_local_authority(authority)
