"""Chat completions as any OpenAI client asks for them, one at once and one streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from bullpen.demo.checks import DemoError, expect

PROMPT = "Who is warm when the coach calls?"
ANSWER_SECONDS = 60.0
TOKENS = 24
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """What a model said; ``seconds`` is how long that took."""

    text: str
    tokens: int
    finish_reason: str
    seconds: float


def ask(url: str, model: str, tokens: int = TOKENS) -> Answer:
    """Ask for a chat completion.

    Raises:
        DemoError: the answer does not come, or is not what was asked for.
    """
    begun = time.monotonic()
    try:
        reply = httpx.post(url + PATH, json=request(model, tokens), timeout=ANSWER_SECONDS, trust_env=False)
    except httpx.HTTPError as problem:
        raise DemoError(f"{model} did not answer {PATH}: {problem!r}") from problem
    expect(reply.status_code == 200, f"{model} answered {PATH} with {reply.status_code}: {reply.text[:200]}")
    body = reply.json()
    choice = body["choices"][0]
    answer = Answer(
        choice["message"]["content"] or "",
        body["usage"]["completion_tokens"],
        choice["finish_reason"],
        time.monotonic() - begun,
    )
    return checked(answer, model, tokens)


def stream(url: str, model: str, show: Callable[[str], None]) -> Answer:
    """Ask for a chat completion and show it piece by piece, as it comes.

    Raises:
        DemoError: the answer does not come, or is not what was asked for.
    """
    begun = time.monotonic()
    text, tokens, finish_reason = "", 0, ""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        for chunk in events(url, {**request(model, TOKENS), **more}, model):
            tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                if piece := choice["delta"].get("content"):
                    text += piece
                    show(piece)
    except httpx.HTTPError as problem:
        raise DemoError(f"{model} broke off its streamed answer: {problem!r}") from problem
    return checked(Answer(text, tokens, finish_reason, time.monotonic() - begun), model, TOKENS)


def events(url: str, body: dict[str, Any], model: str) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer."""
    with httpx.stream("POST", url + PATH, json=body, timeout=ANSWER_SECONDS, trust_env=False) as reply:
        expect(reply.status_code == 200, f"{model} answered {PATH} with {reply.status_code}")
        for line in reply.iter_lines():
            data = line.removeprefix("data: ").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
    raise DemoError(f"{model} ended its streamed answer without [DONE]")


def request(model: str, tokens: int) -> dict[str, Any]:
    """A request whose answer is the same each time, and just so long."""
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def checked(answer: Answer, model: str, tokens: int) -> Answer:
    """The answer, if it is complete.

    Raises:
        DemoError: it is empty, too short, or ends for another reason than its length.
    """
    expect(answer.tokens == tokens, f"{model} was asked for {tokens} tokens and gave {answer.tokens}")
    expect(answer.finish_reason == "length", f"{model} ended its answer with {answer.finish_reason!r}, not 'length'")
    expect(bool(answer.text) or tokens == 1, f"{model} gave an empty answer")
    return answer


def printable(text: str) -> str:
    """Text without what would upset a terminal: a model with random weights says anything, half characters too."""
    return "".join(c if c.isascii() and c.isprintable() else "·" for c in text)
