"""The service of vllm-bootstrap, under its own paths: what its published client calls.

Its callers get the sampling parameters that they name and vLLM's defaults for the rest, never the model's own
generation config. A vLLM server merges that config into every parameter that a request leaves out, so a request of
this service leaves none of them out. (`--generation-config vllm` would do the same for a whole server, but drops the
config's end-of-text tokens too, which the original heeds.)
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from bullpen.proto import bootstrap as pb
from bullpen.rpc import completions, embeddings
from bullpen.rpc.access import Context
from bullpen.rpc.batches import MOST_INPUTS
from bullpen.rpc.failures import CallError, Reported, admit, bootstrap_failure
from bullpen.rpc.methods import stream, unary
from bullpen.rpc.ports import InstanceFinder, Served
from bullpen.rpc.upstream import Json, Upstream

SERVICE = "vllm_bootstrap.InferenceService"

DEFAULT_MAX_TOKENS = 16
NEUTRAL: Json = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""vLLM's own defaults of what a generation config may set."""


class Bootstrap:
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
                "Embed": unary(self.embed, pb.EmbedRequest, turns),
                "Complete": unary(self.complete, pb.CompleteRequest, turns),
                "EmbedStream": stream(self.embed_stream, pb.EmbedRequest, turns),
                "CompleteStream": stream(self.complete_stream, pb.CompleteRequest, turns),
            },
        )

    async def embed(self, request: pb.EmbedRequest, context: Context) -> bytes:
        """A vector for each text, in their order."""
        parts = [b""] * len(request.texts)
        async with self._reported(context, request.launch_id, "Embedding"):
            served = self._embedder(request)
            found = embeddings.embedded(self._upstream, served, request.texts, {})
            async with aclosing(found):
                async for place, values in found:
                    parts[place] = pb.EmbedResponse(embeddings=[pb.Embedding(values=values)]).SerializeToString()
        return await _joined(parts)

    async def complete(self, request: pb.CompleteRequest, context: Context) -> bytes:
        """A completion for each prompt, in their order."""
        async with self._reported(context, request.launch_id, "Generation"):
            served = self._generator(request)
            prompts, wanted = request.prompts, parameters(request)
            if len(prompts) == 1:
                return _complete_response(await completions.only(self._upstream, served, prompts[0], wanted))
            parts = [b""] * len(prompts)
            async with aclosing(completions.finished(self._upstream, served, prompts, wanted)) as pieces:
                async for piece in pieces:
                    parts[piece.index] = _complete_response(piece)
        return await _joined(parts)

    async def embed_stream(self, request: pb.EmbedRequest, context: Context) -> None:
        """A vector for each text, in their order, each when it and those before it are done."""
        async with self._reported(context, request.launch_id, "Embedding stream"):
            served = self._embedder(request)
            found = embeddings.embedded(self._upstream, served, request.texts, {}, most=embeddings.TOGETHER_IN_STREAM)
            turn = _InTurn(context)
            async with aclosing(found):
                async for place, values in found:
                    await turn.send(place, pb.Embedding(values=values))

    async def complete_stream(self, request: pb.CompleteRequest, context: Context) -> None:
        """A completion for each prompt, in their order, each when it and those before it are done."""
        async with self._reported(context, request.launch_id, "Generation stream"):
            served = self._generator(request)
            pieces = completions.finished(self._upstream, served, request.prompts, parameters(request))
            turn = _InTurn(context)
            async with aclosing(pieces):
                async for piece in pieces:
                    await turn.send(piece.index, _completion(piece))

    def _embedder(self, request: pb.EmbedRequest) -> Served:
        if not request.texts:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "texts must not be empty")
        return admit(self._instances, request.launch_id, "embed")

    def _generator(self, request: pb.CompleteRequest) -> Served:
        if not request.prompts:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "prompts must not be empty")
        return admit(self._instances, request.launch_id, "generate")

    def _reported(self, context: Context, launch_id: str, work: str) -> Reported:
        return Reported(context, partial(bootstrap_failure, self._instances, launch_id, work))


class _InTurn:
    """Sends items in the order of their places, whatever the order in which they come."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waiting: dict[int, Any] = {}
        self._next = 0

    async def send(self, place: int, item: Any) -> None:
        """Send an item, and those that waited for it, as soon as all before it are sent."""
        self._waiting[place] = item
        while (ready := self._waiting.pop(self._next, None)) is not None:
            self._next += 1
            await self._context.write(ready)


def parameters(request: pb.CompleteRequest) -> Json:
    """A request's sampling parameters, as vLLM's OpenAI API has them."""
    wanted = {**NEUTRAL, "max_tokens": request.max_tokens if request.max_tokens > 0 else DEFAULT_MAX_TOKENS}
    for name in ("temperature", "top_p"):
        if request.HasField(name):
            wanted[name] = getattr(request, name)
    guided = request.guided_decoding
    if guided.choice:
        wanted["structured_outputs"] = {"choice": list(guided.choice)}
    elif (kind := guided.WhichOneof("kind")) is not None:
        name = "json" if kind == "json_schema" else kind
        wanted["structured_outputs"] = {name: getattr(guided, kind)}
    return wanted


def _completion(piece: completions.Piece) -> pb.Completion:
    return pb.Completion(text=piece.text, prompt_tokens=piece.prompt_tokens, completion_tokens=piece.completion_tokens)


def _complete_response(piece: completions.Piece) -> bytes:
    """The answer with one completion. Such answers, one after the other, are the one with all of them."""
    return pb.CompleteResponse(completions=[_completion(piece)]).SerializeToString()


async def _joined(parts: list[bytes]) -> bytes:
    """One message of many."""
    if len(parts) <= MOST_INPUTS:
        return b"".join(parts)
    return await asyncio.to_thread(b"".join, parts)  # which lets the event loop run, as little else in Python does
