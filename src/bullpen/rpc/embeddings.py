"""Embeddings of the instances' OpenAI servers."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from bullpen.rpc.batches import Slice, merged, slices
from bullpen.rpc.ports import Served
from bullpen.rpc.upstream import Json, LostError, Upstream

PATH = "/v1/embeddings"
TOGETHER = 64
"""Inputs in one request: with the longest vectors that models have, its answer is still read in milliseconds."""
TOGETHER_IN_STREAM = 32
"""The same where results are wanted early: an answer comes when all of its request are done."""


async def embedded(
    upstream: Upstream, served: Served, texts: Sequence[str], parameters: Json, most: int = TOGETHER
) -> AsyncGenerator[tuple[int, array[float]], None]:
    """The vectors, each with its text's place, as they come; `most` texts go in one request.

    Raises as `Upstream.ask` does.
    """

    def results(part: Slice) -> AsyncGenerator[tuple[int, array[float]], None]:
        return _part(upstream, served, part.first, part.inputs, parameters)

    async with aclosing(merged(slices(texts, most), results, upstream.turns)) as vectors:
        async for item in vectors:
            yield item


async def _part(
    upstream: Upstream, served: Served, first: int, texts: Sequence[str], parameters: Json
) -> AsyncGenerator[tuple[int, array[float]], None]:
    # Base64 of 32-bit floats: exact, and several times cheaper than decimal numbers on both sides.
    body = {"model": served.served_model_name, "input": texts, **parameters, "encoding_format": "base64"}
    answer = await upstream.ask(served, PATH, body)
    try:
        vectors = [(first + item["index"], _floats(item["embedding"])) for item in answer["data"]]
        if len(vectors) != len(texts):
            raise ValueError(f"{len(vectors)} vectors for {len(texts)} texts")
    except (LookupError, TypeError, ValueError) as problem:
        raise LostError(f"the answer is not what the API has ({problem!r})") from problem
    for vector in vectors:
        yield vector


def _floats(text: str) -> array[float]:
    values = array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        values.byteswap()
    return values
