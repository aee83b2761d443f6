"""Packets for asyncio: nothing blocks, nothing is lost, no descriptor stays open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from bullpen.errors import LaunchError
from bullpen.node.packets import PacketStream, ProcessEndedError
from bullpen.zygote import protocol

SECONDS = 10.0
Ends = tuple[PacketStream, socket.socket]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(SECONDS)
    stream = PacketStream(ours)
    yield stream, theirs
    stream.close()
    theirs.close()


async def read(sock: socket.socket) -> tuple[protocol.Message, list[int]] | None:
    """The next message, read outside the event loop."""
    return await asyncio.to_thread(protocol.receive, sock)


async def test_a_question_and_its_answer(ends: Ends) -> None:
    stream, theirs = ends
    asking = asyncio.ensure_future(stream.ask({"op": "check"}))
    assert await read(theirs) == ({"op": "check"}, [])
    before = descriptors()
    protocol.send(theirs, {"ok": True}, (0, 1))
    assert await asking == {"ok": True}
    assert descriptors() == before, "descriptors that nobody asked for are closed"


async def test_messages_come_in_order_with_their_descriptors(ends: Ends) -> None:
    stream, theirs = ends
    for number in range(5):
        protocol.send(theirs, {"id": number}, (0,) * (number % 3))
    for number in range(5):
        packet = await asyncio.wait_for(stream.receive(), SECONDS)
        assert packet is not None
        assert (packet[0], len(packet[1])) == ({"id": number}, number % 3)
        for descriptor in packet[1]:
            os.close(descriptor)


async def test_more_than_the_other_side_takes_is_sent_later(ends: Ends) -> None:
    """As when hundreds of creates have waited for one zygote to be warm."""
    stream, theirs = ends
    before = descriptors()
    file = os.open(os.devnull, os.O_RDONLY)
    for number in range(1000):
        stream.send({"id": number}, (file,) if number % 100 == 99 else ())
    os.close(file)
    assert descriptors() > before, "copies wait with their messages"
    for number in range(1000):
        packet = await read(theirs)
        assert packet is not None
        assert (packet[0]["id"], len(packet[1])) == (number, 1 if number % 100 == 99 else 0)
        for descriptor in packet[1]:
            os.close(descriptor)
    stream.send({"id": "last"})
    assert await read(theirs) == ({"id": "last"}, [])
    assert descriptors() == before


async def test_the_end_wakes_whoever_waits_and_stays_the_end(ends: Ends) -> None:
    stream, theirs = ends
    asking = asyncio.ensure_future(stream.ask({"op": "check"}))
    await read(theirs)
    theirs.close()
    with pytest.raises(ProcessEndedError, match="ended; the zygote's log may say why"):
        await asyncio.wait_for(asking, SECONDS)
    assert await asyncio.wait_for(stream.receive(), SECONDS) is None
    with pytest.raises(ProcessEndedError):
        await stream.ask({"op": "check"})
    with pytest.raises(OSError, match="closed"):
        stream.send({})


async def test_what_was_said_before_the_end_is_heard(ends: Ends) -> None:
    """Even where the other side left something of ours unread, which the kernel reports as a reset."""
    stream, theirs = ends
    protocol.send(theirs, {"event": "broken"})
    stream.send({"op": "lease"})
    theirs.close()
    packet = await asyncio.wait_for(stream.receive(), SECONDS)
    assert packet == ({"event": "broken"}, [])
    assert await asyncio.wait_for(stream.receive(), SECONDS) is None


async def test_closing_wakes_whoever_waits(ends: Ends) -> None:
    stream, theirs = ends
    asking = asyncio.ensure_future(stream.ask({"op": "check"}))
    await read(theirs)
    stream.close()
    with pytest.raises(LaunchError):
        await asyncio.wait_for(asking, SECONDS)
    stream.close()


async def test_closing_drops_what_was_not_read_or_sent(ends: Ends) -> None:
    stream, theirs = ends
    before = descriptors()
    for _ in range(3):
        protocol.send(theirs, {}, (0, 1, 2))
    await asyncio.sleep(0.02)
    for _ in range(400):
        stream.send({}, (0,))
    assert descriptors() > before + 9
    stream.close()
    assert descriptors() == before - 1


async def test_junk_is_the_end(ends: Ends) -> None:
    stream, theirs = ends
    theirs.send(b"junk")
    assert await asyncio.wait_for(stream.receive(), SECONDS) is None


async def test_silence_is_an_error_at_the_deadline(ends: Ends) -> None:
    stream, _ = ends
    with pytest.raises(LaunchError, match="has not answered for 0 s; try again"):
        await asyncio.wait_for(stream.ask({"op": "check"}, seconds=0.05), SECONDS)


async def test_too_much_is_refused(ends: Ends) -> None:
    stream, _ = ends
    with pytest.raises(LaunchError, match=r"options and environment are too long: .* at most"):
        await stream.ask({"argv": "x" * protocol.MAX_MESSAGE})
