"""The JSON of every answer, shaped as vLLM shapes it."""

import base64
import os
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from bullpen.sim.requests import ApiError, EmbeddingRequest, GenerateRequest, Json, TokenizeRequest
from bullpen.sim.words import token_number, tokens, vector, wrong_vector

FINGERPRINT = "bullpen-sim"
OWNER = "bullpen-sim"


class Answer(ABC):
    """The answer to one request for text, whole or in pieces; completions and chat completions differ in shape only."""

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    piece_kind: ClassVar[str]

    def __init__(self, request: GenerateRequest, model: str) -> None:
        self.request = request
        self._identity: Json = {
            "id": f"{self.prefix}-{os.urandom(8).hex()}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], made: int, reason: str) -> Json:
        """The answer in one: a text for each choice, of `made` tokens each."""
        return {
            **self._identity,
            "object": self.whole_kind,
            "choices": [{"index": index, **self._text(text), **_end(reason)} for index, text in enumerate(texts)],
            "system_fingerprint": FINGERPRINT,
            "usage": self._usage(made),
        }

    def opening(self) -> list[Json]:
        """What a stream begins with, before the first token."""
        return []

    def piece(self, index: int, token: str, reason: str | None, made: int) -> Json:
        """One token of a stream, the `made`th of its choice; the last one comes with the reason why it is the last."""
        return self._piece({**self._token(token), **_end(reason)}, index, made)

    def usage_piece(self, made: int) -> Json:
        """The last piece of a stream whose client asked for the usage."""
        content = {**self._identity, "object": self.piece_kind, "choices": []}
        return {**content, "usage": self._usage(made), "system_fingerprint": FINGERPRINT}

    @abstractmethod
    def _text(self, text: str) -> Json:
        """The part of a choice that holds a whole text."""

    @abstractmethod
    def _token(self, token: str) -> Json:
        """The part of a choice that holds one token."""

    def _piece(self, choice: Json, index: int, made: int) -> Json:
        content: Json = {**self._identity, "object": self.piece_kind, "choices": [{"index": index, **choice}]}
        if self.request.continuous_usage:  # of this choice alone, unlike what comes at the end
            prompt = self.request.prompts[index // self.request.choices]
            content["usage"] = _counts(prompt.tokens, made)
        return content

    def _usage(self, made: int) -> Json:
        prompts = self.request.prompts
        return _counts(sum(prompt.tokens for prompt in prompts), made * len(prompts) * self.request.choices)


class CompletionAnswer(Answer):
    """The answer of `POST /v1/completions`."""

    prefix = "cmpl"
    whole_kind = piece_kind = "text_completion"

    def _text(self, text: str) -> Json:
        return {"text": text}

    def _token(self, token: str) -> Json:
        return {"text": token}


class ChatAnswer(Answer):
    """The answer of `POST /v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """The role comes before the first token."""
        role: Json = {"delta": {"role": "assistant", "content": ""}, **_end(None)}
        return [self._piece(role, index, 0) for index in range(self.request.choices)]

    def _text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None, "reasoning": None}}

    def _token(self, token: str) -> Json:
        return {"delta": {"content": token}}


def error(problem: ApiError) -> Json:
    """An error in the OpenAI API's shape."""
    fields = {"message": problem.message, "type": problem.kind, "param": problem.parameter, "code": problem.status}
    return {"error": fields}


def models(names: Sequence[str], root: str, max_model_len: int, created: int) -> Json:
    """The list of served models."""
    fields = {"created": created, "owned_by": OWNER, "root": root, "parent": None, "max_model_len": max_model_len}
    return {"object": "list", "data": [{"id": name, "object": "model", **fields} for name in names]}


def embeddings(request: EmbeddingRequest, model: str, name: str, wrong: bool) -> Json:
    """The vectors of all inputs, or `wrong` ones; `model` makes them, `name` is what it is called in the answer."""
    data = []
    for index, text in enumerate(request.inputs):
        values = wrong_vector() if wrong else vector(model, text.text)
        packed = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        data.append({"index": index, "object": "embedding", "embedding": packed if request.base64 else values})
    count = sum(text.tokens for text in request.inputs)
    identity = {"id": f"embd-{os.urandom(8).hex()}", "created": int(time.time()), "model": name}
    return {**identity, "object": "list", "data": data, "usage": _counts(count, 0)}


def tokenization(request: TokenizeRequest, max_model_len: int) -> Json:
    """The tokens of a text."""
    words = tokens(request.text)
    return {
        "count": len(words),
        "max_model_len": max_model_len,
        "tokens": [token_number(word) for word in words],
        "token_strs": words if request.return_token_strings else None,
    }


def _counts(prompt_tokens: int, made: int) -> Json:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + made, "completion_tokens": made}


def _end(reason: str | None) -> Json:
    return {"logprobs": None, "finish_reason": reason, "stop_reason": None}
