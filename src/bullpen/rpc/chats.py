"""Chat completions of the instances' OpenAI servers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from bullpen.proto import v1 as pb
from bullpen.rpc.completions import aborted
from bullpen.rpc.ports import Served
from bullpen.rpc.sampling import chat_logprobs, chat_parameters
from bullpen.rpc.upstream import Json, LostError, Upstream

PATH = "/v1/chat/completions"


async def chat(upstream: Upstream, served: Served, request: pb.ChatRequest) -> pb.ChatResponse:
    """The whole answer. Raises as `Upstream.ask` does."""
    answer = await upstream.ask(served, PATH, _body(served, request))
    try:
        return pb.ChatResponse(choices=[_choice(choice) for choice in answer["choices"]], usage=_usage(answer["usage"]))
    except (LookupError, TypeError, AttributeError) as problem:
        raise LostError(f"the answer is not what the API has ({problem!r})") from problem


async def chat_streamed(
    upstream: Upstream, served: Served, request: pb.ChatRequest
) -> AsyncGenerator[pb.ChatDelta, None]:
    """The pieces of the answer as they come. Raises as `Upstream.stream` does."""
    body = _body(served, request) | {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    # A server that does not count as it goes tells the sum at the end, which is the count where there is one answer.
    held: pb.ChatDelta | None = None
    async with aclosing(upstream.stream(served, PATH, body)) as events:
        async for event in events:
            try:
                usage = event.get("usage")
                deltas = [_delta(choice, usage) for choice in event["choices"]]
            except (LookupError, TypeError, AttributeError) as problem:
                raise LostError(f"the answer is not what the API has ({problem!r})") from problem
            for delta in deltas:
                if delta.finish_reason and not usage and body.get("n", 1) == 1:
                    held = delta
                else:
                    yield delta
            if not deltas and usage and held is not None:
                held.usage.CopyFrom(_usage(usage))
    if held is not None:
        yield held


def _body(served: Served, request: pb.ChatRequest) -> Json:
    messages = [_message(message) for message in request.messages]
    return {"model": served.served_model_name, "messages": messages, **chat_parameters(request.sampling)}


def _message(message: pb.ChatMessage) -> Json:
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": message.content, **named}


def _choice(choice: Json) -> pb.ChatChoice:
    message = choice["message"]
    if choice["finish_reason"] == "abort":
        raise aborted()
    return pb.ChatChoice(
        choice=choice["index"],
        message=pb.ChatMessage(role=message["role"], content=message.get("content") or ""),
        reasoning=message.get("reasoning") or "",
        finish_reason=choice["finish_reason"] or "",
        logprobs=chat_logprobs(choice.get("logprobs")),
    )


def _delta(choice: Json, usage: Json | None) -> pb.ChatDelta:
    delta, reason = choice["delta"], choice.get("finish_reason")
    if reason == "abort":
        raise aborted()
    return pb.ChatDelta(
        choice=choice["index"],
        role=delta.get("role") or "",
        content=delta.get("content") or "",
        reasoning=delta.get("reasoning") or "",
        finish_reason=reason or "",
        usage=_usage(usage) if usage and reason else None,
        logprobs=chat_logprobs(choice.get("logprobs")),
    )


def _usage(usage: Json) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage.get("completion_tokens") or 0)
