"""Long lists of inputs: cut as they are needed, few asked for at a time, and no long step in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from bullpen.core.instance import Address
from bullpen.rpc import batches
from bullpen.rpc.batches import CHARACTERS_AT_ONCE, INPUTS_AT_ONCE, MOST_INPUTS, Slice, merged, slices
from bullpen.rpc.ports import Served
from bullpen.rpc.turns import LARGE, Turns
from bullpen.rpc.upstream import EVENTS_TOGETHER, Upstream
from tests.rpc.engine import Asked, scripted
from tests.rpc.rounds import counted


class Asking:
    """Gives one result for each input, once `may_end` is set; takes note of what is asked for at a time, and when."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.begun: list[Slice] = []
        self.under_way: set[int] = set()
        self.most_characters = self.most_inputs = 0

    async def results(self, part: Slice) -> AsyncGenerator[int, None]:
        self.begun.append(part)
        self.under_way.add(part.first)
        now = [other for other in self.begun if other.first in self.under_way]
        self.most_inputs = max(self.most_inputs, sum(len(other.inputs) for other in now))
        self.most_characters = max(self.most_characters, sum(other.characters for other in now))
        try:
            await self.may_end.wait()
            for place in range(part.first, part.first + len(part.inputs)):
                yield place
        finally:
            self.under_way.discard(part.first)


def test_a_slice_holds_what_one_request_may() -> None:
    texts = ["x" * 1000] * 300 + ["y" * (3 * LARGE)] + ["z"] * 3000
    parts = list(slices(texts))
    assert [text for part in parts for text in part.inputs] == texts
    assert [part.first for part in parts] == [sum(len(p.inputs) for p in parts[:n]) for n in range(len(parts))]
    for part in parts:
        assert part.characters == sum(map(len, part.inputs))
        assert len(part.inputs) <= MOST_INPUTS and (part.characters <= LARGE or len(part.inputs) == 1)
    assert len(parts) == 2 + 1 + 3


def test_slices_are_made_when_they_are_asked_for() -> None:
    class Texts(list[str]):
        looked_at = 0

        def __getitem__(self, place: int) -> str:  # type: ignore[override]
            raise AssertionError("nobody needs a copy")

        def __iter__(self):  # type: ignore[no-untyped-def]
            for text in super().__iter__():
                self.looked_at += 1
                yield text

    texts = Texts(["x"] * 100_000)
    parts = slices(texts, 32)
    next(parts)
    assert texts.looked_at == 33


@pytest.mark.parametrize(
    ("texts", "most", "at_once"),
    [
        (["x"] * 10_000, MOST_INPUTS, INPUTS_AT_ONCE // MOST_INPUTS),
        (["x"] * 10_000, 32, INPUTS_AT_ONCE // 32),
        (["x" * LARGE] * 50, MOST_INPUTS, CHARACTERS_AT_ONCE // LARGE),
        (["x" * (2 * CHARACTERS_AT_ONCE)] * 3, MOST_INPUTS, 1),
    ],
)
async def test_few_are_asked_for_at_a_time(texts: list[str], most: int, at_once: int) -> None:
    asking = Asking()
    found: list[int] = []

    async def read() -> None:
        async for place in merged(slices(texts, most), asking.results, Turns()):
            found.append(place)

    reading = asyncio.ensure_future(read())
    for _ in range(10 * at_once + 100):
        await asyncio.sleep(0)
    assert len(asking.begun) == at_once and not found
    asking.may_end.set()
    await reading
    assert sorted(found) == list(range(len(texts)))
    assert asking.most_inputs <= INPUTS_AT_ONCE
    assert asking.most_characters <= max(CHARACTERS_AT_ONCE, len(texts[0]))


async def test_each_is_begun_in_a_turn_of_its_own_whoever_asks() -> None:
    turns = Turns()
    begun: list[int] = []
    async with counted() as rounds:

        async def results(part: Slice) -> AsyncGenerator[int, None]:
            if part.first:
                begun.append(rounds.count)
            await asyncio.sleep(0.01)
            yield part.first

        async def read() -> None:
            async for _ in merged(slices(["x"] * 640, 32), results, turns):
                pass

        await asyncio.gather(*(read() for _ in range(5)))
    assert len(begun) == 5 * 19
    assert len(set(begun)) == len(begun)


async def test_an_error_ends_all_and_so_does_leaving() -> None:
    asking = Asking()

    async def results(part: Slice) -> AsyncGenerator[int, None]:
        if part.first == 2:
            raise ValueError("no")
        async for place in asking.results(part):
            yield place

    with pytest.raises(ValueError, match="no"):
        async for _ in merged(slices(["x"] * 10, 1), results, Turns()):
            pass
    assert asking.begun and not asking.under_way
    asking.may_end.set()
    left = merged(slices(["x"] * 10, 1), asking.results, Turns())
    await anext(left)
    await left.aclose()
    assert not asking.under_way


async def test_results_that_are_all_there_come_in_short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    async def results(part: Slice) -> AsyncGenerator[int, None]:
        for place in part.inputs:
            yield int(place)

    async with counted() as rounds:
        async for _ in merged(slices(list(map(str, range(5000)))), results, Turns()):
            seen.append(rounds.count)
    assert max(map(seen.count, set(seen))) <= 2 * batches._AHEAD


async def test_events_that_are_all_there_are_read_in_short_steps() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.chunk(b'data: {"n": 1}\n\n' * 4000)
        await asked.end()

    seen: list[int] = []
    async with scripted(script) as (_, address), counted() as rounds:
        upstream = Upstream()
        async for _ in upstream.stream(one(address), "/x", {}):
            seen.append(rounds.count)
        upstream.close()
    assert len(seen) == 4000
    assert max(map(seen.count, set(seen))) <= 2 * EVENTS_TOGETHER


async def test_large_answers_are_read_one_at_a_time() -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"text": "x" * LARGE})

    read: list[int] = []
    async with scripted(script) as (_, address), counted() as rounds:
        upstream = Upstream()

        async def ask() -> None:
            await upstream.ask(one(address), "/x", {})
            read.append(rounds.count)

        await asyncio.gather(*(ask() for _ in range(20)))
        upstream.close()
    assert len(set(read)) == len(read) == 20


def one(address: Address) -> Served:
    return Served("one", "ready", "generate", address, "model")
