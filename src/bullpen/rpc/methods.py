"""How a service's methods become what a gRPC server wants."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from bullpen.rpc.access import Context, Handler
from bullpen.rpc.messages import parsed
from bullpen.rpc.turns import Turns

UNREADABLE = (
    "the request cannot be read: it is damaged or cut off, or no message of the kind that this method takes;"
    " make it with the .proto files that the server's reflection tells"
)


def unary(
    method: Callable[[Any, Context], Awaitable[Message | bytes]], request: type[Message], turns: Turns
) -> Handler:
    """A method with one answer, which may be a message's bytes already."""
    make: Callable[..., Handler] = grpc.unary_unary_rpc_method_handler
    return make(_reading(method, request, turns), None, _serialize)


def stream(method: Callable[[Any, Context], Awaitable[None]], request: type[Message], turns: Turns) -> Handler:
    """A method that writes its answers."""
    make: Callable[..., Handler] = grpc.unary_stream_rpc_method_handler
    return make(_reading(method, request, turns), None, _serialize)


def _reading(
    method: Callable[[Any, Context], Awaitable[Any]], request: type[Message], turns: Turns
) -> Callable[[bytes, Context], Awaitable[Any]]:
    """A method that takes a request's bytes: gRPC would read a large one in one go."""

    async def read(data: bytes, context: Context) -> Any:
        try:
            message = await parsed(request, data, turns)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, UNREADABLE)
        del data
        return await method(message, context)

    return read


def _serialize(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
