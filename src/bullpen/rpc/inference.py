"""Bullpen's own service: chat, completions, embeddings. Its `.proto` file says what the fields mean."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from bullpen.proto import v1 as pb
from bullpen.rpc import chats, completions, embeddings, relay
from bullpen.rpc.access import Context
from bullpen.rpc.failures import CallError, Reported, admit, failure
from bullpen.rpc.methods import stream, unary
from bullpen.rpc.ports import InstanceFinder, Served, Task
from bullpen.rpc.sampling import completion_logprobs, completion_parameters
from bullpen.rpc.upstream import Upstream

SERVICE = "bullpen.v1.Inference"


class Inference:
    """Answers the service's calls.

    Args:
        instances: finds what a call is for.
        upstream: the connections to them.
    """

    def __init__(self, instances: InstanceFinder, upstream: Upstream) -> None:
        self._instances = instances
        self._upstream = upstream

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server needs to serve it."""
        turns = self._upstream.turns
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Complete": stream(self.complete, pb.CompleteRequest, turns),
                "StreamComplete": stream(self.stream_complete, pb.CompleteRequest, turns),
                "Chat": unary(self.chat, pb.ChatRequest, turns),
                "StreamChat": stream(self.stream_chat, pb.ChatRequest, turns),
                "Embed": stream(self.embed, pb.EmbedRequest, turns),
                "Relay": unary(self.relay, pb.RelayRequest, turns),
            },
        )

    async def complete(self, request: pb.CompleteRequest, context: Context) -> None:
        """A completion for each prompt, each when it is finished."""
        async with self._reported(context, request.instance_id):
            served = self._admit(request, "generate", "prompts", request.prompts)
            parameters = completion_parameters(request.sampling)
            found = completions.finished(self._upstream, served, request.prompts, parameters)
            async with aclosing(found) as pieces:
                async for piece in pieces:
                    await context.write(pb.Completion(**_fields(piece)))

    async def stream_complete(self, request: pb.CompleteRequest, context: Context) -> None:
        """The pieces of all completions as they come."""
        async with self._reported(context, request.instance_id):
            served = self._admit(request, "generate", "prompts", request.prompts)
            parameters = completion_parameters(request.sampling)
            found = completions.streamed(self._upstream, served, request.prompts, parameters)
            async with aclosing(found) as pieces:
                async for piece in pieces:
                    await context.write(pb.CompletionDelta(**_fields(piece)))

    async def chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        """The answer to a conversation."""
        async with self._reported(context, request.instance_id):
            served = self._admit(request, "generate", "messages", request.messages)
            answer = await chats.chat(self._upstream, served, request)
        return answer

    async def stream_chat(self, request: pb.ChatRequest, context: Context) -> None:
        """The pieces of the answer to a conversation."""
        async with self._reported(context, request.instance_id):
            served = self._admit(request, "generate", "messages", request.messages)
            async with aclosing(chats.chat_streamed(self._upstream, served, request)) as deltas:
                async for delta in deltas:
                    await context.write(delta)

    async def embed(self, request: pb.EmbedRequest, context: Context) -> None:
        """A vector for each text, each when it is finished."""
        async with self._reported(context, request.instance_id):
            served = self._admit(request, "embed", "texts", request.texts)
            wanted = {"dimensions": request.dimensions} if request.HasField("dimensions") else {}
            found = embeddings.embedded(
                self._upstream, served, request.texts, wanted, most=embeddings.TOGETHER_IN_STREAM
            )
            async with aclosing(found) as vectors:
                async for place, values in vectors:
                    await context.write(pb.Embedding(index=place, values=values))

    async def relay(self, request: pb.RelayRequest, context: Context) -> pb.RelayResponse:
        """The answer of the instance's own server."""
        async with Reported(context, partial(relay.failure, self._instances, request.instance_id)):
            relay.check(request)
            served = admit(self._instances, request.instance_id, None, "Instance")
            status, body = await self._upstream.relay(served, request.path, request.body)
        return pb.RelayResponse(status=status, body=body)

    def _admit(self, request: Any, task: Task, name: str, inputs: Any) -> Served:
        """The instance that a call is for, with the name of the model in it that the call asks for."""
        if not inputs:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, f"{name} must not be empty")
        served = admit(self._instances, request.instance_id, task, "Instance")
        return replace(served, served_model_name=request.model) if request.model else served

    def _reported(self, context: Context, instance_id: str) -> Reported:
        return Reported(context, partial(failure, self._instances, instance_id))


def _fields(piece: completions.Piece) -> dict[str, Any]:
    """A piece as the fields that a completion and a delta of one share."""
    usage = None
    if piece.finish_reason is not None:
        usage = pb.Usage(prompt_tokens=piece.prompt_tokens, completion_tokens=piece.completion_tokens)
    return {
        "index": piece.index,
        "choice": piece.choice,
        "text": piece.text,
        "finish_reason": piece.finish_reason or "",
        "usage": usage,
        "logprobs": completion_logprobs(piece.logprobs),
    }
