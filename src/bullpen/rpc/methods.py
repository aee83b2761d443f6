"""How a service's methods become what a gRPC server wants."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from bullpen.rpc.access import Context, Handler


def unary(method: Callable[[Any, Context], Awaitable[Message]], request: type[Message]) -> Handler:
    """A method with one answer."""
    make: Callable[..., Handler] = grpc.unary_unary_rpc_method_handler
    return make(method, request.FromString, _serialize)


def stream(method: Callable[[Any, Context], Awaitable[None]], request: type[Message]) -> Handler:
    """A method that writes its answers."""
    make: Callable[..., Handler] = grpc.unary_stream_rpc_method_handler
    return make(method, request.FromString, _serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
