"""Long lists of inputs: cut into requests of a size that servers take, whose results come as one stream again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

from bullpen.rpc.turns import LARGE, Turns

MOST_INPUTS = 1024
"""In one request: vLLM's `VLLM_MAX_COMPLETION_PROMPTS`."""
INPUTS_AT_ONCE = 4096
"""In all requests of a call that are under way. vLLM computes at most 1024 at a time; the rest is there when those are
done, and what others ask meanwhile need not wait for more."""
CHARACTERS_AT_ONCE = 4 * 1024 * 1024
"""The same: more tokens than an engine's cache holds."""
_AHEAD = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slice:
    """The inputs of one request.

    Attributes:
        first: the place of the first of them in the whole list.
    """

    first: int
    inputs: list[str]
    characters: int


def slices(inputs: Sequence[str], most: int = MOST_INPUTS) -> Iterator[Slice]:
    """Cut a list, as it is asked for, into such as one request may hold: at most `LARGE` characters, or one input."""
    start, part, characters = 0, list[str](), 0
    for place, text in enumerate(inputs):
        if part and (len(part) == most or characters + len(text) > LARGE):
            yield Slice(start, part, characters)
            start, part, characters = place, [], 0
        part.append(text)
        characters += len(text)
    yield Slice(start, part, characters)


async def merged(
    parts: Iterator[Slice], results: Callable[[Slice], AsyncGenerator[T, None]], turns: Turns
) -> AsyncGenerator[T, None]:
    """The results of all slices as they come, of few slices at a time. An error in one ends all.

    Args:
        parts: at least one.
        results: asks for those of one slice.
        turns: taken before each slice.
    """
    first, second = next(parts), next(parts, None)
    if second is None:
        async with aclosing(results(first)) as only:
            async for result in only:
                yield result
        return
    under_way = _UnderWay(results)
    under_way.begin(first)
    waiting: Slice | None = second
    try:
        while waiting is not None or under_way.inputs:
            while waiting is not None and under_way.has_room(waiting):
                await turns.take()
                under_way.begin(waiting)
                waiting = next(parts, None)
            item = await under_way.items.get()
            if not isinstance(item, _End):
                yield item
            else:
                under_way.ended(item)
    finally:
        await under_way.close()


@dataclass(frozen=True, slots=True)
class _End:
    """What follows a slice's last result."""

    part: Slice
    problem: Exception | None


class _UnderWay(Generic[T]):
    """The slices that are asked for now, and what comes of them.

    Attributes:
        items: what came and was not taken yet.
        inputs: how many are asked for.
    """

    def __init__(self, results: Callable[[Slice], AsyncGenerator[T, None]]) -> None:
        self.items: asyncio.Queue[T | _End] = asyncio.Queue(_AHEAD)
        self.inputs = 0
        self._characters = 0
        self._results = results
        self._tasks: set[asyncio.Task[None]] = set()

    def has_room(self, part: Slice) -> bool:
        """Whether a slice may be asked for already. One at least may be, however large."""
        return not self.inputs or (
            self.inputs + len(part.inputs) <= INPUTS_AT_ONCE
            and self._characters + part.characters <= CHARACTERS_AT_ONCE
        )

    def begin(self, part: Slice) -> None:
        """Ask for a slice."""
        self.inputs += len(part.inputs)
        self._characters += part.characters
        task = asyncio.ensure_future(self._drain(part))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def ended(self, end: _End) -> None:
        """Take note of a slice's end. Raises what ended it."""
        if end.problem is not None:
            raise end.problem
        self.inputs -= len(end.part.inputs)
        self._characters -= end.part.characters

    async def close(self) -> None:
        """Give up what is still asked for."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, part: Slice) -> None:
        problem: Exception | None = None
        try:
            async with aclosing(self._results(part)) as found:
                async for item in found:
                    await self.items.put(item)
        except Exception as caught:
            problem = caught
        await self.items.put(_End(part, problem))
