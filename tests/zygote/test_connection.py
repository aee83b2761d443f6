"""A client that does not read: nobody waits for it, nothing is lost or put in another order."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from bullpen.zygote import connection, protocol
from bullpen.zygote.connection import Connection

Ends = tuple[Connection, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    client = Connection(ours)
    yield client, theirs
    client.close()
    theirs.close()


def read_all(sock: socket.socket) -> list[tuple[protocol.Message, int]]:
    """All messages that have come, with how many descriptors came with each."""
    found: list[tuple[protocol.Message, int]] = []
    while True:
        try:
            received = protocol.receive(sock)
        except BlockingIOError:
            return found
        if received is None:
            return found
        for descriptor in received[1]:
            os.close(descriptor)
        found.append((received[0], len(received[1])))


def test_what_is_not_read_waits_in_order(ends: Ends) -> None:
    client, theirs = ends
    count = 0
    while not client.is_behind():
        client.tell({"id": count})
        count += 1
    file = os.open(os.devnull, os.O_RDONLY)
    client.tell({"id": count}, (file,))
    os.close(file)  # the caller's own; the message keeps a copy
    client.tell({"id": count + 1})
    found = []
    while client.is_behind():
        found += read_all(theirs)
        client.flush()
    found += read_all(theirs)
    assert [message["id"] for message, _ in found] == list(range(count + 2))
    assert [number for _, number in found] == [0] * count + [1, 0]


def test_a_client_that_is_hopelessly_behind_counts_as_gone(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = ends
    monkeypatch.setattr(connection, "MOST_UNREAD", 3)
    with pytest.raises(ConnectionAbortedError, match="3 messages unread"):
        for number in range(100_000):
            client.tell({"id": number})


def test_hanging_up_closes_what_waits(ends: Ends) -> None:
    client, _ = ends
    while not client.is_behind():
        client.tell({})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        client.tell({}, (0, 1))
    client.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_the_end_is_seen_without_reading(ends: Ends) -> None:
    client, theirs = ends
    assert not client.has_hung_up()
    protocol.send(theirs, {"op": "status"})
    assert not client.has_hung_up()
    assert client.receive() == ({"op": "status"}, [])
    with pytest.raises(BlockingIOError):
        client.receive()
    theirs.close()
    assert client.has_hung_up()
    assert client.receive() is None
    with pytest.raises(OSError, match="roken pipe"):
        client.tell({})


def test_junk_ends_the_connection(ends: Ends) -> None:
    client, theirs = ends
    theirs.send(b"junk")
    assert client.receive() is None
