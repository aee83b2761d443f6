"""The two ports: which they are, and what is said where one cannot be had."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from bullpen.daemon.ports import LAST_PORT, bound, shown, take_ports
from bullpen.errors import StateError
from bullpen.node.settings import Settings

LOCAL = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server((LOCAL, 0)) as other:
        yield other.getsockname()[1]


def ports(**settings: int) -> tuple[int, int | None]:
    """The ports that a daemon takes."""
    http, grpc = take_ports(Settings(host=LOCAL, **settings))
    with http:
        if grpc is None:
            return http.getsockname()[1], None
        with grpc:
            return http.getsockname()[1], grpc.getsockname()[1]


def free_pair() -> int:
    """A port that is free as the one after it is."""
    return ports(port=0)[0]


def test_grpc_comes_after_rest() -> None:
    http, grpc = ports(port=0)
    assert grpc == http + 1
    assert ports(port=http) == (http, http + 1)


def test_grpc_where_it_was_asked_for() -> None:
    http = free_pair()
    assert ports(port=0, grpc_port=http)[1] == http


def test_zero_is_no_grpc() -> None:
    assert ports(port=0, grpc_port=0)[1] is None


def test_taken_ports_are_told(taken: int) -> None:
    with pytest.raises(StateError, match=f"cannot listen on {LOCAL}:{taken}: .* --port"):
        ports(port=taken)
    free = free_pair()
    with pytest.raises(StateError, match=f"cannot listen on {LOCAL}:{taken} for gRPC: .* --grpc-port"):
        ports(port=free, grpc_port=taken)
    bound(LOCAL, free).close()  # it was given back


def test_one_port_for_both_is_told() -> None:
    free = free_pair()
    with pytest.raises(StateError, match=f"cannot share port {free}: choose another --grpc-port"):
        ports(port=free, grpc_port=free)
    bound(LOCAL, free).close()  # it was never taken
    assert ports(port=0, grpc_port=0)[1] is None


def test_no_port_comes_after_the_last() -> None:
    with pytest.raises(StateError, match="choose a --grpc-port"):
        ports(port=LAST_PORT)


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::", "[::1]")])
def test_addresses_are_shown_as_callers_write_them(host: str, expected: str) -> None:
    with bound(host, 0) as address:
        assert shown(address) == f"{expected}:{address.getsockname()[1]}"
