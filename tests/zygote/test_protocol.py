"""The protocol: one JSON object a packet, and no descriptor lost, whatever the other side sends."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bullpen.zygote import protocol

JSON = st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.text() | st.booleans())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


Ends = tuple[socket.socket, socket.socket]


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@settings(max_examples=50)
@given(message=st.dictionaries(st.text(), JSON))
def test_what_is_sent_arrives(message: protocol.Message) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        protocol.send(ours, message)
        assert protocol.receive(theirs) == (message, [])


def test_descriptors_arrive_and_are_not_inherited(ends: Ends, tmp_path: Path) -> None:
    ours, theirs = ends
    (tmp_path / "file").write_text("hello")
    with (tmp_path / "file").open() as file:
        protocol.send(ours, {"op": "start"}, (file.fileno(), file.fileno()))
    received = protocol.receive(theirs)
    assert received is not None
    assert received[0] == {"op": "start"}
    assert [os.get_inheritable(descriptor) for descriptor in received[1]] == [False, False]
    assert [os.pread(descriptor, 9, 0) for descriptor in received[1]] == [b"hello", b"hello"]
    for descriptor in received[1]:
        os.close(descriptor)


def test_messages_keep_their_borders(ends: Ends) -> None:
    ours, theirs = ends
    for number in range(3):
        protocol.send(ours, {"id": number})
    ours.close()
    assert [protocol.receive(theirs) for _ in range(4)] == [({"id": 0}, []), ({"id": 1}, []), ({"id": 2}, []), None]


def test_the_largest_message_fits_and_a_larger_one_is_refused(ends: Ends) -> None:
    ours, theirs = ends
    frame = len('{"x": ""}')
    message = {"x": "a" * (protocol.MAX_MESSAGE - frame)}
    protocol.send(ours, message)
    assert protocol.receive(theirs) == (message, [])
    with pytest.raises(protocol.MessageTooLargeError, match=f"{protocol.MAX_MESSAGE + 1} bytes .* at most"):
        protocol.send(ours, {"x": message["x"] + "a"})


@pytest.mark.parametrize(
    "junk",
    [b"junk", b"[]", b"1", b'"text"', b"null", b"\xff\xfe", b"{", b"[" * 100_000, b" " * (protocol.MAX_MESSAGE + 1)],
    ids=["words", "list", "number", "text", "null", "bytes", "cut", "deep", "long"],
)
def test_junk_is_refused_and_its_descriptors_closed(ends: Ends, junk: bytes) -> None:
    ours, theirs = ends
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * protocol.MAX_MESSAGE)
    before = descriptors()
    socket.send_fds(ours, [junk], [0, 1, 2])
    with pytest.raises(protocol.ProtocolError):
        protocol.receive(theirs)
    assert descriptors() == before


def test_more_descriptors_than_allowed_are_dropped_by_the_kernel(ends: Ends) -> None:
    ours, theirs = ends
    before = descriptors()
    socket.send_fds(ours, [b"{}"], [0] * 20)
    received = protocol.receive(theirs)
    assert received is not None
    assert len(received[1]) == protocol.MAX_DESCRIPTORS
    for descriptor in received[1]:
        os.close(descriptor)
    assert descriptors() == before


def test_a_process_that_may_open_no_more_gets_the_message_without_descriptors(ends: Ends) -> None:
    ours, theirs = ends
    protocol.send(ours, {"id": 1}, (0, 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)  # the lowest free number: everything above is out of reach, below nothing is free
    os.close(spare)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        received = protocol.receive(theirs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert received == ({"id": 1}, [])


def test_the_peer_is_known(ends: Ends) -> None:
    assert protocol.peer_uid(ends[0]) == os.getuid()
