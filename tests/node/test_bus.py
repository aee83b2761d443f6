"""The event bus: a counter, a buffer for those who come back, and watchers of all speeds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bullpen.node import bus as bus_module
from bullpen.node.bus import Bus, RevisionGoneError, encode

SECONDS = 10.0


async def take(stream: AsyncIterator[str], count: int) -> list[dict[str, Any]]:
    """So many lines of a stream."""
    return [json.loads(await asyncio.wait_for(anext(stream), SECONDS)) for _ in range(count)]


async def rest(stream: AsyncIterator[str]) -> list[dict[str, Any]]:
    """All lines to the end of a stream."""

    async def read() -> list[dict[str, Any]]:
        return [json.loads(line) async for line in stream]

    return await asyncio.wait_for(read(), SECONDS)


def publish(bus: Bus, first: int, last: int) -> None:
    for revision in range(first, last + 1):
        bus.publish("CREATED", {"revision": revision}, revision)


def revisions(lines: list[dict[str, Any]]) -> list[int]:
    return [line["object"]["revision"] for line in lines]


def test_a_line_is_one_line() -> None:
    line = encode("CREATED", {"annotations": {"a": "x\ny ✓"}})
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert json.loads(line) == {"type": "CREATED", "object": {"annotations": {"a": "x\ny ✓"}}}


async def test_a_watcher_gets_what_was_first_and_then_what_happens() -> None:
    bus = Bus()
    stream = bus.subscribe([encode("CREATED", {"revision": 0})], fine=False)
    publish(bus, 1, 3)
    assert revisions(await take(stream, 4)) == [0, 1, 2, 3]
    assert bus.revision == 3


async def test_nothing_is_missed_between_the_list_and_the_watch() -> None:
    bus = Bus()
    publish(bus, 1, 5)
    stream = bus.subscribe(bus.missed(3), fine=False)
    publish(bus, 6, 6)
    assert revisions(await take(stream, 3)) == [4, 5, 6]


def test_what_was_missed() -> None:
    bus = Bus()
    publish(bus, 1, 5)
    assert bus.missed(5) == []
    assert revisions([json.loads(line) for line in bus.missed(0)]) == [1, 2, 3, 4, 5]


def test_what_has_not_happened_yet_is_gone_too() -> None:
    bus = Bus()
    publish(bus, 1, 5)
    with pytest.raises(RevisionGoneError, match="revision 6 has not happened yet; the newest is 5"):
        bus.missed(6)


def test_what_is_no_longer_kept_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "BUFFERED_EVENTS", 10)
    bus = Bus()
    publish(bus, 1, 25)
    assert revisions([json.loads(line) for line in bus.missed(15)]) == list(range(16, 26))
    with pytest.raises(RevisionGoneError, match="after revision 14 are no longer kept, the oldest is 15; list, then"):
        bus.missed(14)


def test_the_past_of_an_earlier_daemon_is_kept() -> None:
    bus = Bus(7, [(6, encode("CREATED", {"revision": 6})), (7, encode("DELETED", {"revision": 7}))])
    assert revisions([json.loads(line) for line in bus.missed(5)]) == [6, 7]
    with pytest.raises(RevisionGoneError):
        bus.missed(4)
    with pytest.raises(RevisionGoneError):
        bus.missed(8)


def test_a_hole_in_the_past_is_not_passed_over() -> None:
    """The journal could not keep the newest event: who has not seen it must list again."""
    bus = Bus(7, [(5, encode("CREATED", {"revision": 5}))])
    with pytest.raises(RevisionGoneError):
        bus.missed(5)
    assert bus.missed(7) == []
    publish(bus, 8, 8)
    assert revisions([json.loads(line) for line in bus.missed(7)]) == [8]


async def test_finer_events_are_for_those_who_ask() -> None:
    bus = Bus()
    coarse, fine = bus.subscribe([], fine=False), bus.subscribe([], fine=True)
    bus.publish_fine("STATE", {"revision": 0, "state": "ready"})
    publish(bus, 1, 1)
    assert [line["type"] for line in await take(fine, 2)] == ["STATE", "CREATED"]
    assert [line["type"] for line in await take(coarse, 1)] == ["CREATED"]
    assert bus.revision == 1
    assert len(bus.missed(0)) == 1, "finer events are not kept"


async def test_a_heartbeat_comes_to_those_who_ask_for_finer_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "HEARTBEAT_SECONDS", 0.02)
    bus = Bus(41)
    coarse, fine = bus.subscribe([], fine=False), bus.subscribe([], fine=True)
    waiting = asyncio.ensure_future(take(coarse, 1))
    beats = await take(fine, 3)
    assert beats == [{"type": "HEARTBEAT", "object": {"revision": 41}}] * 3
    assert not waiting.done()
    publish(bus, 42, 42)
    assert revisions(await waiting) == [42]
    while (line := (await take(fine, 1))[0])["type"] == "HEARTBEAT":
        pass
    assert line["object"]["revision"] == 42


async def test_a_heartbeat_comes_among_other_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "HEARTBEAT_SECONDS", 0.05)
    bus = Bus()
    stream = bus.subscribe([], fine=True)

    async def chatter() -> None:
        while bus.watchers:
            bus.publish_fine("STATE", {"revision": 0})
            await asyncio.sleep(0.005)

    chattering = asyncio.ensure_future(chatter())
    lines = await take(stream, 100)
    assert {line["type"] for line in lines} == {"STATE", "HEARTBEAT"}
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(chattering, SECONDS)


async def test_a_watcher_that_does_not_read_is_cut_off_and_can_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "QUEUED_LINES", 5)
    bus = Bus()
    slow, quick = bus.subscribe([], fine=False), bus.subscribe([], fine=False)
    for revision in range(1, 21):
        publish(bus, revision, revision)
        assert revisions(await take(quick, 1)) == [revision]
    assert bus.watchers == 1
    seen = revisions(await rest(slow))
    assert seen == [1, 2, 3, 4, 5]
    assert revisions([json.loads(line) for line in bus.missed(seen[-1])]) == list(range(6, 21))


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    bus = Bus()
    stream = bus.subscribe([], fine=True)
    publish(bus, 1, 1)
    await take(stream, 1)
    assert bus.watchers == 1
    await stream.aclose()  # type: ignore[attr-defined]
    assert bus.watchers == 0


async def test_a_watcher_is_forgotten_when_its_request_is_cancelled() -> None:
    bus = Bus()
    waiting = asyncio.ensure_future(take(bus.subscribe([], fine=True), 1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert bus.watchers == 0


async def test_closing_ends_every_stream_after_what_came_before() -> None:
    bus = Bus()
    streams = [bus.subscribe([], fine=fine) for fine in (False, True)]
    publish(bus, 1, 2)
    bus.close()
    assert [revisions(await rest(stream)) for stream in streams] == [[1, 2], [1, 2]]
    late = bus.subscribe([encode("CREATED", {"revision": 9})], fine=False)
    assert revisions(await rest(late)) == [9]
