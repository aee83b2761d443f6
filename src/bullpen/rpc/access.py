"""Who may call: callers with the key; where no key is set, callers on this host, unless told otherwise.

The rule is `bullpen.access`, the REST API's too. `grpc.health.v1.Health/Check` answers anyone, as probes send no key.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio

from bullpen.access import REMOTE, carries_key, is_loopback, is_proxied

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check"})

UNAUTHENTICATED = "Invalid or missing access key"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Access(grpc.aio.ServerInterceptor):
    """Keeps out who may not call, before anything else looks at the call.

    Args:
        key: the access key; None where there is none.
        allow_unauthenticated: answer remote callers although there is no key.
    """

    def __init__(self, key: str | None, allow_unauthenticated: bool = False) -> None:
        self._key = key.strip().encode(errors="surrogateescape") if key and key.strip() else None
        self._open = allow_unauthenticated
        self._guarded: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Pass a call on, or refuse it whatever its method: an unknown one is no exception."""
        if handler_call_details.method in OPEN_METHODS:
            return await continuation(handler_call_details)
        if self._key is not None:
            headers = (
                (name, value if isinstance(value, bytes) else value.encode())
                for name, value in handler_call_details.invocation_metadata
            )
            return await continuation(handler_call_details) if carries_key(headers, self._key) else _WITHOUT_KEY
        if self._open:
            return await continuation(handler_call_details)
        if is_proxied(name for name, _ in handler_call_details.invocation_metadata):
            return _THROUGH_PROXY
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if method not in self._guarded:
            self._guarded[method] = _for_own_host(handler)
        return self._guarded[method]


def _refusing(code: grpc.StatusCode, details: str) -> Handler:
    """A handler that fits every method: it reads no request and sends no answer."""

    async def refuse(requests: AsyncIterator[Any], context: Context) -> None:
        await context.abort(code, details)

    return grpc.stream_stream_rpc_method_handler(refuse, bytes, bytes)


_WITHOUT_KEY = _refusing(grpc.StatusCode.UNAUTHENTICATED, UNAUTHENTICATED)
_THROUGH_PROXY = _refusing(grpc.StatusCode.PERMISSION_DENIED, REMOTE)


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
    return is_loopback(rest.rpartition(":")[0].strip("[]"))
