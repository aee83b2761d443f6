"""A gRPC server over a book of launches that tests fill, and callers of its methods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from bullpen.core.instance import Address
from bullpen.proto import bootstrap, v1
from bullpen.rpc.ports import Served, Task
from bullpen.rpc.server import RpcServer
from bullpen.rpc.settings import RpcSettings
from bullpen.sim import words

MODEL = "test/model"
DEADLINE_SECONDS = 20.0

BOOTSTRAP = "/vllm_bootstrap.InferenceService/"
INFERENCE = "/bullpen.v1.Inference/"


class Book:
    """The launches that there are."""

    def __init__(self) -> None:
        self.launches: dict[str, Served] = {}

    def find(self, launch_id: str) -> Served | None:
        return self.launches.get(launch_id)

    def add(
        self, launch_id: str, address: Address | int, task: Task = "generate", state: str = "ready", **more: Any
    ) -> None:
        """Add or replace a launch; a port alone is one of this host."""
        where = Address("127.0.0.1", address) if isinstance(address, int) else address
        self.launches[launch_id] = Served(launch_id, state, task, where, MODEL, **more)


class Rpc:
    """A server that serves, a channel to it, and every method of both services."""

    def __init__(self, book: Book, server: RpcServer, channel: grpc.aio.Channel) -> None:
        self.book, self.server, self.channel = book, server, channel
        b, v = bootstrap, v1
        self.embed = self._unary(BOOTSTRAP + "Embed", b.EmbedResponse)
        self.complete = self._unary(BOOTSTRAP + "Complete", b.CompleteResponse)
        self.embed_stream = self._stream(BOOTSTRAP + "EmbedStream", b.Embedding)
        self.complete_stream = self._stream(BOOTSTRAP + "CompleteStream", b.Completion)
        self.chat = self._unary(INFERENCE + "Chat", v.ChatResponse)
        self.stream_chat = self._stream(INFERENCE + "StreamChat", v.ChatDelta)
        self.complete_v1 = self._stream(INFERENCE + "Complete", v.Completion)
        self.stream_complete = self._stream(INFERENCE + "StreamComplete", v.CompletionDelta)
        self.relay = self._unary(INFERENCE + "Relay", v.RelayResponse)
        self.embed_v1 = self._stream(INFERENCE + "Embed", v.Embedding)

    def _unary(self, path: str, answer: type[Any]) -> Callable[..., Any]:
        return self.channel.unary_unary(path, lambda message: message.SerializeToString(), answer.FromString)

    def _stream(self, path: str, answer: type[Any]) -> Callable[..., Any]:
        return self.channel.unary_stream(path, lambda message: message.SerializeToString(), answer.FromString)


def raw(kind: Callable[..., Any], path: str) -> Callable[..., Any]:
    """A method called with bytes; `kind` is a channel's way of making one."""
    method: Callable[..., Any] = kind(path)
    return method


@asynccontextmanager
async def serving(book: Book | None = None, **settings: Any) -> AsyncIterator[Rpc]:
    """Serve for as long as the context lasts."""
    book = book or Book()
    server = RpcServer(book, RpcSettings(**settings))
    await server.start()
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=unlimited) as channel:
            yield Rpc(book, server, channel)
    finally:
        await server.stop(0)


async def everything(call: Any) -> list[Any]:
    """All that a stream gives."""
    return [item async for item in call]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """The code and the details with which a call ends, one answer or a stream."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (everything(call) if hasattr(call, "__aiter__") else call)
    return caught.value.code(), caught.value.details() or ""


async def eventually(what: str, probe: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not await asyncio.to_thread(probe):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.005)


def completion(prompt: str, tokens: int = 16) -> str:
    """What the simulator's model says to a prompt."""
    text = words.completion(MODEL, prompt)
    return "".join(next(text) for _ in range(tokens))
