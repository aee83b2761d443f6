"""Ports: checked on the host, picked, held for a server that is about to bind them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from bullpen.errors import ConflictError, InvalidRequestError, LaunchError
from bullpen.node import ports
from bullpen.node.ports import FIRST, LAST, Ports, bind, resolve

NONE: frozenset[int] = frozenset()
HAS_IPV6 = os.path.exists("/proc/net/if_inet6")


@pytest.fixture
def held() -> Iterator[Ports]:
    held = Ports()
    yield held
    for owner in list(held._held):
        held.release(owner)


def listener(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen()
    return sock


def free_port() -> int:
    with listener() as sock:
        return int(sock.getsockname()[1])


def test_a_free_port_is_picked(held: Ports) -> None:
    port = held.hold("a", None, "127.0.0.1", NONE)
    assert FIRST <= port <= LAST


def test_no_port_is_picked_twice(held: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST", 21_000)
    monkeypatch.setattr(ports, "LAST", 21_009)
    monkeypatch.setattr(ports, "PICKS", 10)
    avoid = frozenset({21_003, 21_004})
    picked: list[int] = []
    while True:
        try:
            picked.append(held.hold(f"owner {len(picked)}", None, "127.0.0.1", avoid))
        except LaunchError as problem:
            assert str(problem) == "no free port between 21000 and 21009; give one with --port"
            break
    assert len(picked) == len(set(picked))
    assert set(picked) <= set(range(21_000, 21_010)) - avoid
    assert len(picked) > 2
    held.release("owner 0")
    assert held.hold("another", None, "127.0.0.1", avoid) == picked[0]


def test_a_port_that_another_program_listens_on_is_a_conflict(held: Ports) -> None:
    with listener() as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConflictError, match=f"port {port} is in use by another program on this host; choose"):
            held.hold("a", port, "127.0.0.1", NONE)
    assert held.hold("a", port, "127.0.0.1", NONE) == port


@pytest.mark.parametrize(("theirs", "ours"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_every_address_stands_in_the_way_of_each(held: Ports, theirs: str, ours: str) -> None:
    with listener(theirs) as sock, pytest.raises(ConflictError):
        held.hold("a", sock.getsockname()[1], ours, NONE)


def test_another_address_does_not_stand_in_the_way(held: Ports) -> None:
    with listener("127.0.0.2") as sock:
        port = sock.getsockname()[1]
        assert held.hold("a", port, "127.0.0.1", NONE) == port


@pytest.mark.skipif(not HAS_IPV6, reason="this kernel has no IPv6")
def test_ipv6(held: Ports) -> None:
    with listener("::1") as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConflictError):
            held.hold("a", port, "::1", NONE)
        assert held.hold("a", port, "127.0.0.1", NONE) == port
    assert held.hold("b", free_port(), "::1", NONE)


def test_a_server_binds_and_listens_on_a_held_port(held: Ports) -> None:
    port = held.hold("a", None, "127.0.0.1", NONE)
    with listener("127.0.0.1", port) as server:
        held.release("a")
        with socket.create_connection(("127.0.0.1", port), 5):
            assert server.accept()[0].fileno() > 0


def test_the_kernel_gives_a_held_port_to_nobody(held: Ports) -> None:
    port = held.hold("a", None, "127.0.0.1", NONE)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    held.release("a")
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # it may have served an earlier test
        stranger.bind(("127.0.0.1", port))


def test_what_is_held_for_another_is_a_conflict_and_ones_own_is_not(held: Ports) -> None:
    port = held.hold("a", None, "127.0.0.1", NONE)
    with pytest.raises(ConflictError, match=f"port {port} is held for another instance"):
        held.hold("b", port, "127.0.0.1", NONE)
    assert held.hold("a", port, "127.0.0.1", NONE) == port
    held.release("a")
    held.release("a")
    assert held.hold("b", port, "127.0.0.1", NONE) == port


def test_held_sockets_are_not_inherited(held: Ports) -> None:
    held.hold("a", None, "127.0.0.1", NONE)
    assert not held._held["a"].get_inheritable()


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("192.0.2.1", 8123, "cannot be bound: cannot assign requested address; choose another --host"),
        ("127.0.0.1", 70_000, "port 70000 is none; ports go from 1 to 65535"),
        ("no address at all", 8123, "cannot be bound"),
    ],
)
def test_what_this_host_cannot_bind_is_the_requests_fault(host: str, port: int, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        bind(host, port)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::1", "192.0.2.1"])
async def test_an_address_stands_for_itself(address: str) -> None:
    assert await resolve(address) == address


async def test_names_are_looked_up() -> None:
    assert await resolve("localhost") == "127.0.0.1"
    assert await resolve("") == "0.0.0.0"


@pytest.mark.parametrize("name", ["nobody.invalid", "a" * 300, "with blank"])
async def test_a_name_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="no address is known for that name"):
        await resolve(name)
