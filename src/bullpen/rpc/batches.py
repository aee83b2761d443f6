"""Long lists of inputs: cut into requests of a size that servers take, whose results come as one stream again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

MOST_INPUTS = 1024
"""In one request: vLLM's `VLLM_MAX_COMPLETION_PROMPTS`."""
MOST_CHARACTERS = 4 * 1024 * 1024
"""In one request of more than one input: at most 4 bytes each, which keeps its JSON well under any server's limit."""
_AHEAD = 64

T = TypeVar("T")


def slices(inputs: Sequence[str], most: int = MOST_INPUTS) -> Iterator[tuple[int, Sequence[str]]]:
    """Cut a list into such that one request may hold, each with the place at which it begins."""
    start, characters = 0, 0
    for place, text in enumerate(inputs):
        characters += len(text)
        if place > start and (place - start >= most or characters > MOST_CHARACTERS):
            yield start, inputs[start:place]
            start, characters = place, len(text)
    yield start, inputs[start:]


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What several streams give, as it comes. An error in one ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for result in only:
                yield result
        return
    items: asyncio.Queue[T | _End] = asyncio.Queue(_AHEAD)
    tasks = [asyncio.ensure_future(_drain(stream, items)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if not isinstance(item, _End):
                yield item
            elif item.problem is not None:
                raise item.problem
            else:
                left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class _End:
    """What follows a stream's last item."""

    problem: Exception | None


async def _drain(stream: AsyncGenerator[T, None], items: asyncio.Queue[T | _End]) -> None:
    problem: Exception | None = None
    try:
        async with aclosing(stream):
            async for item in stream:
                await items.put(item)
    except Exception as caught:
        problem = caught
    await items.put(_End(problem))
