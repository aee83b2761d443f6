"""Who may call: callers with the key; where no key is set, callers on this host, unless told otherwise.

`grpc.health.v1.Health/Check` answers anyone, as probes send no key.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hmac
import inspect
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check"})

UNAUTHENTICATED = "Invalid or missing access key"
REMOTE = (
    "this daemon has no access key and answers callers on its own host alone; set BULLPEN_ACCESS_KEY for it, or start"
    " it with --allow-unauthenticated behind a network policy"
)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Access(grpc.aio.ServerInterceptor):
    """Keeps out who may not call, before anything else looks at the call.

    Args:
        key: the access key; None where there is none.
        allow_unauthenticated: answer remote callers although there is no key.
    """

    def __init__(self, key: str | None, allow_unauthenticated: bool = False) -> None:
        self._key = key.strip().encode() if key and key.strip() else None
        self._open = allow_unauthenticated

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Pass a call on, or refuse it whatever its method: an unknown one is no exception."""
        if handler_call_details.method in OPEN_METHODS:
            return await continuation(handler_call_details)
        if self._key is not None:
            allowed = any(
                name == "authorization" and has_key(value, self._key)
                for name, value in handler_call_details.invocation_metadata
            )
            return await continuation(handler_call_details) if allowed else _REFUSAL
        handler = await continuation(handler_call_details)
        return handler if self._open or handler is None else _for_own_host(handler)


def has_key(authorization: str | bytes, key: bytes) -> bool:
    """Whether a header carries the key, as a Bearer token or as the password of HTTP Basic; in constant time."""
    header = authorization if isinstance(authorization, bytes) else authorization.encode()
    scheme, _, credentials = header.strip().partition(b" ")
    given = b""
    if scheme.lower() == b"bearer":
        given = credentials
    elif scheme.lower() == b"basic":
        try:
            given = base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            given = b""
    return hmac.compare_digest(given.strip(), key)


async def _refuse(requests: AsyncIterator[Any], context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNAUTHENTICATED)


# Fits every method: it reads no request and sends no answer.
_REFUSAL: Handler = grpc.stream_stream_rpc_method_handler(_refuse, bytes, bytes)


def _for_own_host(handler: Handler) -> Handler:
    """A handler that answers callers on this host alone."""
    method: Callable[..., Any] = getattr(handler, _kind(handler))

    async def guarded(request: Any, context: Context) -> Any:
        if not is_own_host(context.peer()):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, REMOTE)
        answer = method(request, context)
        if inspect.isasyncgen(answer):
            async for item in answer:
                await context.write(item)
            return None
        return await answer

    make: Callable[..., Handler] = getattr(grpc, f"{_kind(handler)}_rpc_method_handler")
    return make(guarded, handler.request_deserializer, handler.response_serializer)


def _kind(handler: Handler) -> str:
    return f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"


@functools.lru_cache(4096)
def is_own_host(peer: str) -> bool:
    """Whether a peer, as gRPC writes it (`ipv4:127.0.0.1:50`, `ipv6:%5B::1%5D:50`, `unix:`), is on this host."""
    family, _, rest = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6"):
        return family == "unix"
    try:
        address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
