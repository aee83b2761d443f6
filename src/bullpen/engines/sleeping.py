"""What to tell an engine to put it to sleep and to wake it, and how to find out whether it is still itself.

vLLM's sleep mode, as read in its versions 0.30 to 0.33:

- ``/sleep`` ends the requests in flight (``mode=abort``), empties the caches, and gives the accelerator's memory back.
  Level 1 keeps the weights in host memory, level 2 only what cannot be read again from the model's files.
- ``/wake_up`` brings all memory back, or the parts that ``tags`` name; the scheduler goes on when all of it is there.
- A second ``/sleep`` is ignored, without a word in its answer, while the weights sleep. So the way from level 1 to
  level 2 leads through waking them. Versions before 0.31 ignore it while any part sleeps.
- After level 2 the memory of the weights holds nothing of use until they are read again from the model's files, which
  must happen before anything is computed: hence not before the KV cache, which lets the scheduler go on, is there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

WAKES_IN_PART_TO_DEEPEN = (0, 31)
"""The first version of vLLM that can be put to sleep again with its weights alone awake."""

CANARY_PROMPT = "one two three four five six seven eight nine"
"""Short, for models with a small context, and with one way to go on, so that rounding does not change the answer."""
EMBEDDING_VALUES = 64
"""How many values of an embedding are kept; other weights change every one of them."""
EMBEDDING_TOLERANCE = 1e-2
"""Of the largest value: what another order of the same sums may change."""


@dataclass(frozen=True)
class Call:
    """An HTTP request to a server; ``path`` includes the query, ``body`` is JSON."""

    method: str
    path: str
    body: bytes | None = None


IS_SLEEPING = Call("GET", "/is_sleeping")
"""Answered with ``{"is_sleeping": true}`` while any part of the server sleeps or its scheduler stands still."""
VERSION = Call("GET", "/version")
"""Answered with ``{"version": "0.32.0"}``."""
WAKE_ALL = Call("POST", "/wake_up")
WAKE_WEIGHTS = Call("POST", "/wake_up?tags=weights")
WAKE_KV_CACHE = Call("POST", "/wake_up?tags=kv_cache")
RELOAD_WEIGHTS = Call("POST", "/collective_rpc", b'{"method": "reload_weights"}')
RESET_CACHES = (
    Call("POST", "/reset_prefix_cache"),
    Call("POST", "/reset_mm_cache"),
    Call("POST", "/reset_encoder_cache"),
)


def sleep_calls(level: int) -> tuple[Call, ...]:
    """The calls that put an awake server to sleep at level 1 or 2."""
    return (Call("POST", f"/sleep?level={level}&mode=abort"),)


def deepen_calls(version: str) -> tuple[Call, ...]:
    """The calls that take a server from level 1 to level 2; where its version is not known, what suits them all."""
    in_part = _numbers(version) >= WAKES_IN_PART_TO_DEEPEN
    return (WAKE_WEIGHTS if in_part else WAKE_ALL, *sleep_calls(2))


def wake_calls(level: int) -> tuple[Call, ...]:
    """The calls that wake a server that sleeps at level 1 or 2."""
    if level == 1:
        return (WAKE_ALL,)
    return (WAKE_WEIGHTS, RELOAD_WEIGHTS, WAKE_KV_CACHE, *RESET_CACHES)


def canary(served_name: str, pooling: bool) -> Call:
    """One token of a text that can only go on one way, or the embedding of that text."""
    if pooling:
        question: dict[str, Any] = {"input": CANARY_PROMPT, "encoding_format": "float"}
        return Call("POST", "/v1/embeddings", json.dumps({"model": served_name, **question}).encode())
    # The identifiers as well, for a token may be no text at all.
    question = {"prompt": CANARY_PROMPT, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    return Call("POST", "/v1/completions", json.dumps({"model": served_name, **question}).encode())


def canary_answer(pooling: bool, body: bytes) -> str:
    """What was answered: ``text: `` and the token, with its identifier where the server says it, or ``embedding: ``
    and the first values, the largest made 1.

    Raises:
        ValueError: it is no answer to a canary.
    """
    try:
        content = json.loads(body)
        if not pooling:
            choice = content["choices"][0]
            identifiers = choice.get("token_ids")
            return f"text: {choice['text']!r}" + (f" {identifiers}" if identifiers else "")
        values = [float(value) for value in content["data"][0]["embedding"][:EMBEDDING_VALUES]]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as problem:
        raise ValueError(f"no answer to a canary: {body[:100].decode(errors='replace')}") from problem
    largest = max(map(abs, values), default=0.0) or 1.0
    return f"embedding: {json.dumps([round(value / largest, 4) for value in values])}"


def same_answer(one: str, other: str) -> bool:
    """Whether two answers of `canary_answer` are equal, embeddings up to `EMBEDDING_TOLERANCE`."""
    first, second = _embedding(one), _embedding(other)
    if first is None or second is None:
        return one == other
    return len(first) == len(second) and all(
        abs(here - there) <= EMBEDDING_TOLERANCE for here, there in zip(first, second, strict=True)
    )


def _embedding(answer: str) -> list[float] | None:
    kind, _, values = answer.partition(": ")
    return [float(value) for value in json.loads(values)] if kind == "embedding" else None


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with; none of them where it says none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
