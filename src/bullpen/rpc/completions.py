"""Completions of the instances' OpenAI servers: many prompts a request, results as they finish or piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from bullpen.rpc.batches import Slice, merged, slices
from bullpen.rpc.ports import Served
from bullpen.rpc.upstream import Json, LostError, RefusedError, Upstream

PATH = "/v1/completions"
WHOLE = 2**31 - 1
"""As `stream_interval`: a piece of text when it begins and one when it has ended, none between."""


@dataclass(slots=True)
class Piece:
    """A piece of a completion, or all of it.

    Attributes:
        index: of the prompt, from 0.
        choice: which of the prompt's completions it belongs to, from 0.
        finish_reason: why the completion ends here; None where it goes on.
        prompt_tokens: of the prompt; counts are there in a completion's last piece.
        completion_tokens: of this completion so far.
        logprobs: as the API has them, one object for each piece that this one was made of.
    """

    index: int
    choice: int
    text: str
    finish_reason: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: list[Json] = field(default_factory=list)


async def finished(
    upstream: Upstream, served: Served, prompts: Sequence[str], parameters: Json
) -> AsyncGenerator[Piece, None]:
    """Each completion when it is finished. Raises as `Upstream.stream` does."""
    if len(prompts) == 1 and parameters.get("n", 1) == 1:
        yield await only(upstream, served, prompts[0], parameters)
        return
    open_pieces: dict[tuple[int, int], Piece] = {}
    ended = 0
    interval = {"stream_interval": WHOLE}
    async with aclosing(streamed(upstream, served, prompts, {**interval, **parameters})) as pieces:
        async for piece in pieces:
            if (before := open_pieces.pop((piece.index, piece.choice), None)) is not None:
                piece.text = before.text + piece.text
                piece.logprobs = before.logprobs + piece.logprobs
            if piece.finish_reason is None:
                open_pieces[piece.index, piece.choice] = piece
                continue
            ended += 1
            yield piece
    # vLLM says nothing at all of a completion that was aborted before its first token.
    if ended < len(prompts) * max(1, parameters.get("n", 1)):
        raise aborted()


async def streamed(
    upstream: Upstream, served: Served, prompts: Sequence[str], parameters: Json
) -> AsyncGenerator[Piece, None]:
    """The pieces of all completions as they come. Raises as `Upstream.stream` does."""

    def results(part: Slice) -> AsyncGenerator[Piece, None]:
        return _streamed_part(upstream, served, part.first, part.inputs, parameters)

    async with aclosing(merged(slices(prompts), results, upstream.turns)) as pieces:
        async for piece in pieces:
            yield piece


async def only(upstream: Upstream, served: Served, prompt: str, parameters: Json) -> Piece:
    """The one completion of one prompt: what is said of the whole answer is said of it. Raises as `Upstream.ask`."""
    answer = await upstream.ask(served, PATH, {"model": served.served_model_name, "prompt": [prompt], **parameters})
    try:
        return _piece(answer["choices"][0], answer.get("usage"), 0, 1)
    except (LookupError, TypeError) as problem:
        raise LostError(f"the answer is not what the API has ({problem!r})") from problem


async def _streamed_part(
    upstream: Upstream, served: Served, first: int, prompts: Sequence[str], parameters: Json
) -> AsyncGenerator[Piece, None]:
    """The pieces of one request's completions; its prompts are numbered from `first`."""
    body = {
        "model": served.served_model_name,
        "prompt": prompts,
        **parameters,
        "stream": True,
        # With counts in every piece each completion's own are known, not only their sum.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    choices = max(1, parameters.get("n", 1))
    # A server that does not count as it goes tells the sum at the end: the count where there is one completion.
    held: Piece | None = None
    async with aclosing(upstream.stream(served, PATH, body)) as events:
        async for event in events:
            try:
                usage = event.get("usage")
                pieces = [_piece(choice, usage, first, choices) for choice in event["choices"]]
            except (LookupError, TypeError) as problem:
                raise LostError(f"the answer is not what the API has ({problem!r})") from problem
            for piece in pieces:
                if piece.finish_reason is not None and not usage and len(prompts) * choices == 1:
                    held = piece
                else:
                    yield piece
            if not pieces and usage and held is not None:
                _count(held, usage)
    if held is not None:
        yield held


def _piece(choice: Json, usage: Json | None, first: int, choices: int) -> Piece:
    if choice["finish_reason"] == "abort":
        raise aborted()
    place, number = divmod(choice["index"], choices)
    piece = Piece(first + place, number, choice["text"], choice["finish_reason"])
    if logprobs := choice.get("logprobs"):
        piece.logprobs.append(logprobs)
    if usage:
        _count(piece, usage)
    return piece


def aborted() -> RefusedError:
    """What to raise for a request that the engine broke off."""
    return RefusedError(503, "the engine ended the request before it was finished: try again")


def _count(piece: Piece, usage: Any) -> None:
    piece.prompt_tokens = usage["prompt_tokens"]
    piece.completion_tokens = usage.get("completion_tokens") or 0
