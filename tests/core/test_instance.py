"""States, what may follow them, and where an instance answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from bullpen.core.instance import TRANSITIONS, Address, Instance, State
from tests.core.scenario import config


def test_only_the_changes_in_the_table_are_possible() -> None:
    assert set(TRANSITIONS) == set(State)
    for before, after in itertools.product(State, State):
        instance = Instance("a", "key", config(), created_at=0.0, state=before)
        if after in TRANSITIONS[before]:
            instance.enter(after)
            assert instance.state is after
        else:
            with pytest.raises(AssertionError, match="a: "):
                instance.enter(after)
            assert instance.state is before


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (Address("127.0.0.1", 8000), "http://127.0.0.1:8000"),
        (Address("0.0.0.0", 8000), "http://127.0.0.1:8000"),
        (Address("", 8000), "http://127.0.0.1:8000"),
        (Address("::", 8000), "http://[::1]:8000"),
        (Address("fe80::1", 8000), "http://[fe80::1]:8000"),
        (Address("gpu-7", 8000, tls=True), "https://gpu-7:8000"),
        (Address("127.0.0.1", None, uds="/run/m.sock"), "http+unix:///run/m.sock"),
    ],
)
def test_url_for_a_caller_on_this_host(address: Address, url: str) -> None:
    assert address.url == url


def test_running_as_long_as_the_server_process_lives() -> None:
    instance = Instance("a", "key", config(), created_at=0.0)
    assert not instance.running
    assert replace(instance, pid=100).running
    assert replace(instance, pid=100, state=State.FAILED).running, "it outlives SIGKILL"
    assert not replace(instance, pid=100, ended_at=1.0).running
