"""The gate's rules, counts and clock."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.gate.state import DEVELOPMENT_PATHS, MODES, WEBSOCKET, Entry, Gate, Ruling, is_loopback
from tests.gate.client import until


@pytest.mark.parametrize(
    ("method", "path", "peer", "has_pass", "ruling"),
    [
        ("POST", "/v1/completions", "10.0.0.1", False, Ruling.COUNTED),
        ("POST", "/anything", "127.0.0.1", False, Ruling.COUNTED),
        (WEBSOCKET, "/v1/realtime", "127.0.0.1", False, Ruling.COUNTED),
        ("GET", "/v1/models", "10.0.0.1", False, Ruling.FREE),
        ("HEAD", "/health", "10.0.0.1", False, Ruling.FREE),
        ("OPTIONS", "/v1/completions", "10.0.0.1", False, Ruling.FREE),
        ("POST", "/v1/completions", "127.0.0.1", True, Ruling.FREE),
        ("POST", "/v1/completions", None, True, Ruling.FREE),
        ("POST", "/v1/completions", "10.0.0.1", True, Ruling.COUNTED),
        ("POST", "/sleep", "127.0.0.1", False, Ruling.FREE),
        ("POST", "/bullpen/gate", "127.0.0.1", False, Ruling.OWN),
        ("POST", "/bullpen/gate", "10.0.0.1", True, Ruling.ABSENT),
        ("GET", "/bullpen/else", "::1", False, Ruling.OWN),
        ("POST", "/bullpens", "10.0.0.1", False, Ruling.COUNTED),
    ],
)
def test_rules(method: str, path: str, peer: str | None, has_pass: bool, ruling: Ruling) -> None:
    assert Gate().rule(method, path, peer, has_pass) is ruling


@pytest.mark.parametrize("path", sorted(DEVELOPMENT_PATHS))
def test_development_endpoints_are_never_counted_and_can_be_kept_on_this_machine(path: str) -> None:
    for method in ("GET", "POST"):
        assert Gate().rule(method, path, "10.0.0.1", False) is Ruling.FREE
        guarded = Gate.from_environment({"BULLPEN_DEV_ENDPOINTS": "loopback"})
        assert guarded.rule(method, path, "10.0.0.1", True) is Ruling.ABSENT
        assert guarded.rule(method, path, "127.0.0.1", False) is Ruling.FREE


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (None, True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("128.0.0.1", False),
        ("fe80::1%eth0", False),
        ("testclient", False),
        ("", False),
    ],
)
def test_loopback(peer: str | None, expected: bool) -> None:
    assert is_loopback(peer) is expected


@pytest.mark.parametrize(
    "environment",
    [
        {"BULLPEN_DEV_ENDPOINTS": "local"},
        {"BULLPEN_GATE_HOLD_SECONDS": "soon"},
        {"BULLPEN_GATE_HOLD_SECONDS": "-1"},
        {"BULLPEN_GATE_HOLD_SECONDS": "inf"},
    ],
)
def test_what_cannot_be_used_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(environment))):
        Gate.from_environment(environment)


def test_idle_seconds() -> None:
    now = 100.0
    gate = Gate(clock=lambda: now)
    now = 107.5
    assert gate.document() == {"mode": "open", "in_flight": 0, "held": 0, "idle_seconds": 7.5}
    assert gate.enter_at_once()
    assert gate.enter_at_once()
    gate.leave()
    now = 120.0
    assert gate.document() == {"mode": "open", "in_flight": 1, "held": 0, "idle_seconds": 0}
    gate.leave()
    assert gate.document()["idle_seconds"] == 0
    now = 121.0
    assert gate.document()["idle_seconds"] == 1


async def test_a_held_request_keeps_the_gate_busy() -> None:
    now = 0.0
    gate = Gate(clock=lambda: now)
    gate.set_mode("hold")
    waiting = asyncio.create_task(gate.enter())
    await until(lambda: gate.document()["held"] == 1)
    now = 50.0
    assert gate.document()["idle_seconds"] == 0
    waiting.cancel()
    await asyncio.wait([waiting])
    now = 53.0
    assert gate.document() == {"mode": "hold", "in_flight": 0, "held": 0, "idle_seconds": 3}


async def test_closing_again_at_once_lets_nobody_through() -> None:
    gate = Gate()
    gate.set_mode("hold")
    waiting = asyncio.create_task(gate.enter())
    await until(lambda: gate.document()["held"] == 1)
    gate.set_mode("open")
    gate.set_mode("hold")
    for _ in range(10):
        await asyncio.sleep(0)
    assert (gate.document()["in_flight"], gate.document()["held"]) == (0, 1)
    gate.set_mode("open")
    assert await waiting is Entry.ADMITTED


async def test_who_waited_longest_enters_first() -> None:
    gate = Gate()
    gate.set_mode("hold")
    entered: list[int] = []

    async def enter(number: int) -> None:
        assert await gate.enter() is Entry.ADMITTED
        entered.append(number)

    tasks = [asyncio.create_task(enter(number)) for number in range(5)]
    await until(lambda: gate.document()["held"] == 5)
    gate.set_mode("open")
    await asyncio.gather(*tasks)
    assert entered == [0, 1, 2, 3, 4]


@given(
    st.lists(
        st.one_of(st.sampled_from(MODES), st.sampled_from(["request", "end", "cancel", "client leaves", "turn"])),
        max_size=40,
    )
)
def test_counts_are_what_happened(steps: list[str]) -> None:
    """Whatever happens in whatever order: who was admitted and has not left is in flight, who waits is held."""

    async def play() -> None:
        gate = Gate()
        loop = asyncio.get_running_loop()
        requests: list[tuple[asyncio.Task[Entry], asyncio.Future[None]]] = []
        inside = 0
        for step in steps:
            if step in MODES:
                gate.set_mode(step)
            elif step == "request":
                gone: asyncio.Future[None] = loop.create_future()
                requests.append((asyncio.create_task(gate.enter(gone)), gone))
            elif step == "end" and inside:
                gate.leave()
                inside -= 1
            elif step == "cancel" and requests:
                requests[-1][0].cancel()
            elif step == "client leaves" and requests and not requests[0][1].done():
                requests[0][1].set_result(None)
            elif step == "turn":
                for _ in range(5):
                    await asyncio.sleep(0)
                done = [task for task, _ in requests if task.done()]
                inside += sum(not task.cancelled() and task.result() is Entry.ADMITTED for task in done)
                requests = [request for request in requests if not request[0].done()]
                document = gate.document()
                assert (document["in_flight"], document["held"]) == (inside, len(requests))
                assert not requests or gate.mode == "hold"
        for task, _ in requests:
            task.cancel()
        await asyncio.gather(*(task for task, _ in requests), return_exceptions=True)

    asyncio.run(play())
