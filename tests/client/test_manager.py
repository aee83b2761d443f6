"""The asynchronous client's launches, with a box in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import product
from typing import Any

import anyio
import httpx
import pytest

from bullpen.client import wire
from bullpen.client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    Refused,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
)
from bullpen.client.inference import Address
from bullpen.client.launch_errors import (
    Conflict,
    LaunchFailed,
    LaunchTimedOut,
    NotFound,
    RevisionGone,
    ServerFault,
)
from bullpen.client.launches import LaunchResponse, LaunchState
from bullpen.client.manager import VLLMManager
from bullpen.errors import BullpenError
from tests.client.box import URL, Box, new_launch

PATIENCE = 10.0
"""Seconds after which a test that waits has failed."""
READY: dict[str, Any] = {"state": "ready", "phase": None, "progress": None, "remaining_seconds": None}


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
async def manager(box: Box) -> AsyncIterator[VLLMManager]:
    async with VLLMManager(URL, access_key="key", transport=box.transport, retry_seconds=PATIENCE) as manager:
        yield manager


async def eventually(probe: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not probe():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("url", "given", "target", "tls"),
    [
        ("http://h:8000", None, "h:8001", False),
        ("http://h", None, "h:8001", False),
        ("h:8000", None, "h:8001", False),
        ("http://h:8000/api/v9/", None, "h:8001", False),
        ("http://[::1]:8000", None, "[::1]:8001", False),
        ("http://[fd00::2]", None, "[fd00::2]:8001", False),
        ("https://h:443", None, "h:444", True),
        ("https://pod-8000.proxy.example", None, "pod-8000.proxy.example:8001", True),
        ("https://h", "10.0.0.1:2", "10.0.0.1:2", False),
        ("http://h", "https://[::1]:3", "[::1]:3", True),
    ],
)
async def test_address_of_inference(url: str, given: str | None, target: str, tls: bool) -> None:
    async with VLLMManager(url, grpc_address=given) as manager:
        assert manager.grpc_address == target
    assert Address.find(url if "://" in url else f"http://{url}", given).tls == tls


def test_no_port_after_the_last_one() -> None:
    with pytest.raises(InvalidRequest, match="give grpc_address"):
        VLLMManager("http://h:65535")


async def test_launch_sends_what_was_given_and_no_more(manager: VLLMManager, box: Box) -> None:
    launch = await manager.launch("m")
    assert box.bodies[-1] == {"model": "m", "task": "generate"}
    assert (launch.state, launch.phase, launch.remaining_seconds) == (LaunchState.bootstrapping, "load", 3.0)
    assert launch.created_at.tzinfo is not None
    await manager.launch("m", task="embed", gpu_ids=(1,), extra_kwargs={"a": 1}, gpu_count=1, gpu_share=0.5)
    optional = {"gpu_ids": [1], "extra_kwargs": {"a": 1}, "gpu_count": 1, "gpu_share": 0.5}
    assert box.bodies[-1] == {"model": "m", "task": "embed", **optional}


async def test_every_request_has_the_key_and_the_path_its_prefix() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=[])

    async with VLLMManager(f"{URL}/api/v9/", access_key="schlüssel", transport=httpx.MockTransport(answer)) as manager:
        assert await manager.list_launches() == []
    assert seen[0].url.path == "/api/v9/launch"
    assert seen[0].headers.raw and dict(seen[0].headers.raw)[b"Authorization"] == "Bearer schlüssel".encode()


async def test_other_operations(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    assert (await manager.status("one")).model == "m"
    assert [launch.launch_id for launch in await manager.list_launches()] == ["one"]
    assert (await manager.stop("one")).state.ended
    assert box.calls[-1] == "POST /stop/one"
    with pytest.raises(NotFound, match="Unknown launch_id: ü"):
        await manager.status("ü")
    assert box.calls[-1] == "GET /status/%C3%BC"
    with pytest.raises(InvalidRequest, match="no launch can be called 'a/b'"):
        await manager.status("a/b")
    assert "b" not in box.calls[-1]


async def test_stats(manager: VLLMManager, box: Box) -> None:
    gpu = {"gpu_id": 0, "name": "H", "utilization_percent": 1.5, "memory_used_mib": None, "new": 1}
    box.troubles = [
        httpx.Response(
            200, json={"collected_at": "2026-01-01T00:00:00Z", "gpu_count": 1, "gpus": [gpu], "cpu_count": 4}
        )
    ]
    stats = await manager.stats()
    assert (stats.cpu_count, stats.load_avg_1m, stats.gpus[0].utilization_percent) == (4, None, 1.5)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (404, NotFound),
        (409, Conflict),
        (422, InvalidRequest),
        (418, Refused),
        (500, ServerFault),
    ],
)
async def test_refusals_have_the_sentence_of_the_server(
    manager: VLLMManager, box: Box, status: int, kind: type[Refused]
) -> None:
    box.troubles = [httpx.Response(status, json={"detail": "gpu 0 -> x"})]
    with pytest.raises(kind) as caught:
        await manager.launch("m")
    assert (str(caught.value), caught.value.status, type(caught.value)) == ("gpu 0 -> x", status, kind)
    assert isinstance(caught.value, ClientError) and isinstance(caught.value, BullpenError)


async def test_list_of_faults_becomes_a_sentence(manager: VLLMManager, box: Box) -> None:
    box.troubles = [httpx.Response(422, json={"detail": [{"loc": ["body", "task"], "msg": "is wrong"}]})]
    with pytest.raises(InvalidRequest, match=r"^task: is wrong$"):
        await manager.launch("m")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.Response(401, json={"detail": "Unauthorized"}), Unauthorized),
        (httpx.Response(307, headers={"location": "/"}), UnexpectedAnswer),
        (httpx.Response(200, text="<html>"), UnexpectedAnswer),
        (httpx.Response(204), UnexpectedAnswer),
        (httpx.Response(200, json={**new_launch({"model": "m", "task": "x"}), "created_at": "2026-01-01T00:00:00"}),
         UnexpectedAnswer),
    ],
)  # fmt: skip
async def test_what_is_no_answer(manager: VLLMManager, box: Box, answer: httpx.Response, kind: type[Exception]) -> None:
    box.troubles = [answer]
    with pytest.raises(kind):
        await manager.launch("m")


async def test_lost_connection_is_tried_again(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    box.troubles = [httpx.ReadError("reset"), httpx.Response(502), httpx.ConnectError("refused")]
    assert (await manager.status("one")).launch_id == "one"
    box.troubles = [httpx.RemoteProtocolError("gone"), httpx.Response(503, text="busy")]
    assert (await manager.stop("one")).state.ended


async def test_launch_that_may_have_been_made_is_not_made_again(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    box.troubles = [httpx.ReadError("reset")]
    with pytest.raises(ConnectionFailed):
        await manager.launch("m")
    box.troubles = [httpx.Response(502)]
    with pytest.raises(ConnectionFailed, match="502"):
        await manager.launch("m")
    assert box.calls == ["POST /launch"] * 3
    box.troubles = [httpx.ConnectError("refused")]  # it was never sent
    await manager.launch("m")


async def test_url_where_nobody_is_fails_at_once(manager: VLLMManager, box: Box) -> None:
    box.troubles = [httpx.ConnectError("refused")]
    with pytest.raises(ConnectionFailed, match="no Bullpen answers at http://box:8000"):
        await manager.status("one")
    assert len(box.calls) == 1


async def test_budget_ends(box: Box) -> None:
    async with VLLMManager(URL, transport=box.transport, retry_seconds=0.05) as manager:
        box.troubles = [httpx.Response(502, text="<html>") for _ in range(99)]
        with pytest.raises(ConnectionFailed, match="502"):
            await manager.status("one")
    assert 1 < len(box.calls) < 99


# -- waiting -----------------------------------------------------------------------------------------------------


async def test_change_is_told_and_not_polled_for(manager: VLLMManager, box: Box) -> None:
    seen: list[LaunchResponse] = []
    await manager.launch("m")
    waiting = asyncio.create_task(manager.wait_until_ready("one", poll_interval=99, on_progress=seen.append))
    await eventually(lambda: box.watchers)
    box.become(progress=0.5)
    await eventually(lambda: len(seen) == 2)
    box.become(**READY)
    assert (await asyncio.wait_for(waiting, PATIENCE)).state == "ready"
    assert [launch.progress for launch in seen] == [0.25, 0.5, None]
    await eventually(lambda: not box.watchers)


async def test_server_that_tells_is_not_polled(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    waiting = asyncio.create_task(manager.wait_until_ready("one", poll_interval=0.001))
    await eventually(lambda: box.watchers and box.calls[-1] == "GET /status/one")
    asked = len(box.calls)
    await asyncio.sleep(0.05)
    assert len(box.calls) <= asked + 1  # the look that the opened watch asks for
    box.become(**READY)
    await asyncio.wait_for(waiting, PATIENCE)


async def test_server_that_tells_no_more_is_polled(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    waiting = asyncio.create_task(manager.wait_until_ready("one", poll_interval=0.001))
    await eventually(lambda: box.watchers)
    box.has_watch = False
    box.end_watches()
    await eventually(lambda: not box.watchers)
    await eventually(lambda: box.calls.count("GET /status/one") > 5)
    box.become(**READY)
    await asyncio.wait_for(waiting, PATIENCE)


async def test_server_without_watch_is_polled() -> None:
    box = Box(has_watch=False)
    async with VLLMManager(URL, transport=box.transport) as manager:
        await manager.launch("m")
        waiting = asyncio.create_task(manager.wait_until_ready("one", poll_interval=0.001))
        await eventually(lambda: box.calls.count("GET /status/one") > 3)
        box.troubles = [httpx.Response(502), httpx.Response(200, json=new_launch({"model": "m", "task": "x"}, **READY))]
        assert (await asyncio.wait_for(waiting, PATIENCE)).state == "ready"


async def test_change_is_seen_although_the_watch_ends(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    waiting = asyncio.create_task(manager.wait_until_ready("one", poll_interval=0.01))
    await eventually(lambda: box.watchers)
    box.end_watches()
    await eventually(lambda: not box.watchers)
    await eventually(lambda: box.watchers)  # it is opened again
    box.become(**READY)
    assert (await asyncio.wait_for(waiting, PATIENCE)).state == "ready"


async def test_ended_launch_is_an_error_that_says_why(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    box.become(state="failed", error="no such model")
    with pytest.raises(LaunchFailed, match=r"reached terminal state: failed \(no such model\)") as caught:
        await manager.wait_until_ready("one")
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.launch.error == "no such model"


async def test_late_launch_is_an_error_that_says_how_far_it_is(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    with pytest.raises(LaunchTimedOut, match=r"not ready after 0\.05 s \(state=bootstrapping, load 25%\)") as caught:
        await manager.wait_until_ready("one", timeout=0.05)
    assert isinstance(caught.value, TimeoutError) and caught.value.launch is not None
    assert not box.watchers


async def test_timeout_of_a_callback_is_its_own(manager: VLLMManager) -> None:
    await manager.launch("m")

    def fail(_: LaunchResponse) -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match=r"^mine$"):
        await manager.wait_until_ready("one", on_progress=fail, timeout=PATIENCE)


# -- run ---------------------------------------------------------------------------------------------------------


def ready_at_once(box: Box) -> None:
    box.after_call = lambda call: box.launches["one"].update(READY) if call == "POST /launch" else None


async def test_run_stops_what_it_launched(manager: VLLMManager, box: Box) -> None:
    ready_at_once(box)
    async with manager.run("m") as launch:
        assert launch.state == "ready"
        assert box.calls[-1] == "GET /status/one"
    assert box.calls[-1] == "POST /stop/one"


async def test_stop_that_fails_does_not_hide_the_error_of_the_block(manager: VLLMManager, box: Box) -> None:
    ready_at_once(box)
    with pytest.raises(ValueError) as caught:
        async with manager.run("m"):
            box.troubles = [httpx.Response(500, json={"detail": "cannot stop"})]
            raise ValueError("mine")
    assert str(caught.value) == "mine" and "cannot stop" in caught.value.__notes__[0]
    with pytest.raises(ServerFault, match="cannot stop"):
        async with manager.run("m"):
            box.troubles = [httpx.Response(500, json={"detail": "cannot stop"})]


async def test_launch_that_was_removed_meanwhile_is_stopped_enough(manager: VLLMManager, box: Box) -> None:
    ready_at_once(box)
    async with manager.run("m"):
        box.launches.clear()
    assert box.calls[-1] == "POST /stop/one"


async def test_run_that_fails_or_is_late_stops_too(manager: VLLMManager, box: Box) -> None:
    box.after_call = lambda call: box.launches["one"].update(state="failed") if call == "POST /launch" else None
    with pytest.raises(LaunchFailed):
        async with manager.run("m"):
            raise AssertionError("it is not ready")
    assert box.calls[-1] == "POST /stop/one"
    box.after_call = lambda _: None
    with pytest.raises(LaunchTimedOut):
        async with manager.run("m", ready_timeout=0.02):
            raise AssertionError("it is not ready")
    assert box.calls[-1] == "POST /stop/one"


@pytest.mark.parametrize("moment", ["POST /launch", "GET /status/one"])
async def test_cancelled_run_leaves_no_launch(manager: VLLMManager, box: Box, moment: str) -> None:
    async def work() -> None:
        async with manager.run("m"):
            raise AssertionError("it is not ready")

    task = asyncio.create_task(work())
    box.after_call = lambda call: task.cancel() if call == moment else None
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, PATIENCE)
    assert box.calls[-1] == "POST /stop/one"


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        *product(("anyio", "twice"), ("POST /launch", "GET /status/one", "in the block")),
        *product(("all tasks",), ("GET /status/one", "in the block")),  # earlier nobody knows the id
    ],
)
async def test_run_that_is_cancelled_again_and_again_leaves_no_launch(
    manager: VLLMManager, box: Box, how: str, moment: str
) -> None:
    """As by anyio's scopes, at each step anew; by two who cancel; and by `asyncio.run`, whose end cancels the stop."""
    if moment != "GET /status/one":
        ready_at_once(box)
    told, scope = asyncio.Event(), anyio.CancelScope()
    become_ready = box.after_call
    this = asyncio.current_task()

    def look(call: str) -> None:
        become_ready(call)
        if call == moment:
            told.set()

    box.after_call = look

    async def work() -> None:
        with scope:
            async with manager.run("m"):
                told.set()
                await asyncio.sleep(PATIENCE)

    task = asyncio.create_task(work())
    await asyncio.wait_for(told.wait(), PATIENCE)
    while not task.done() and box.calls[-1] != "POST /stop/one":
        if how == "anyio":
            scope.cancel()
        elif how == "twice":
            task.cancel()
        else:
            for one in asyncio.all_tasks() - {this}:
                one.cancel()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled() if how != "anyio" else scope.cancelled_caught
    assert box.launches["one"]["state"] == "stopped"


async def test_cancelled_block_is_left_only_when_its_launch_is_stopped(manager: VLLMManager, box: Box) -> None:
    ready_at_once(box)
    with anyio.move_on_after(0.05) as scope:
        async with manager.run("m"):
            await asyncio.sleep(PATIENCE)
    assert scope.cancelled_caught
    assert box.launches["one"]["state"] == "stopped"


async def test_stop_that_does_not_end_is_given_up(
    manager: VLLMManager, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_: VLLMManager, launch_id: str) -> LaunchResponse:
        await asyncio.sleep(PATIENCE * 10)
        raise AssertionError(launch_id)

    ready_at_once(box)
    monkeypatch.setattr("bullpen.client.lifecycle.STOP_SECONDS", 0.05)
    monkeypatch.setattr(VLLMManager, "stop", hang)
    with pytest.raises(TimedOut, match=r"not done within 0\.05 s"):
        async with manager.run("m"):
            pass


# -- what cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"extra_kwargs": {"x": object()}}, "extra_kwargs cannot be sent as JSON"),
        ({"extra_kwargs": {"x": float("nan")}}, "finite numbers"),
        ({"extra_kwargs": 5}, "extra_kwargs is a dict"),
        ({"gpu_ids": 5}, "gpu_ids is a list"),
        ({"gpu_share": object()}, "gpu_share cannot be sent"),
    ],
)
async def test_launch_that_cannot_be_sent(manager: VLLMManager, box: Box, arguments: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await manager.launch("m", **arguments)
    assert not box.calls


async def test_swap_that_cannot_be_sent(manager: VLLMManager) -> None:
    with pytest.raises(InvalidRequest, match="in cannot be sent"):
        await manager.swap({"options": object()})


async def test_closed_client_says_so(box: Box) -> None:
    async with VLLMManager(URL, transport=box.transport) as manager:
        await manager.list_launches()
    for call in (manager.list_launches(), anext(manager.watch()), manager.embed("one", ["x"])):
        with pytest.raises(ClientError, match="was closed"):
            await call


def test_host_that_can_be_none() -> None:
    with pytest.raises(ClientError, match="write it as http"):
        VLLMManager("http://256.1.1.1:8000")


# -- the watch ---------------------------------------------------------------------------------------------------


async def test_watch_goes_on_after_the_last_event(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    async with aclosing(manager.watch()) as events, asyncio.timeout(PATIENCE):
        assert (await anext(events)).revision == 1
        box.troubles = [httpx.ConnectError("refused"), httpx.Response(502), httpx.Response(503, json={"detail": "x"})]
        box.end_watches()
        assert (await anext(events)).revision == 1
    assert box.calls[1:] == [f"GET {wire.WATCH}", *[f"GET {wire.WATCH}?since=1"] * 4]


async def test_watch_that_missed_events_says_so(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    async with aclosing(manager.watch()) as events, asyncio.timeout(PATIENCE):
        await anext(events)
        box.troubles = [httpx.Response(410, json={"detail": "revision 1 has not happened yet"})]
        box.end_watches()
        with pytest.raises(RevisionGone, match=r"missed while .*not happened yet.*without since"):
            await anext(events)


async def test_watch_ends_when_nobody_comes_back(box: Box) -> None:
    async with VLLMManager(URL, transport=box.transport, retry_seconds=0.05) as manager:
        await manager.launch("m")
        async with aclosing(manager.watch()) as events, asyncio.timeout(PATIENCE):
            await anext(events)
            box.troubles = [httpx.ConnectError("refused") for _ in range(99)]
            box.end_watches()
            with pytest.raises(ConnectionFailed):
                await anext(events)
        box.troubles = [httpx.ConnectError("refused"), httpx.ConnectError("refused")]
        with pytest.raises(ConnectionFailed):
            await anext(manager.watch())
        assert len(box.troubles) == 1


# -- logs --------------------------------------------------------------------------------------------------------


async def test_logs_are_followed_to_the_end(manager: VLLMManager, box: Box) -> None:
    await manager.launch("m")
    box.log = "abcdefg"
    pieces: list[str] = []
    async for piece in manager.follow_logs("one", 1, poll_interval=0.001):
        pieces.append(piece.content)
        if "".join(pieces) == "bcdefg":
            box.log += "hi"
            box.become(state="stopped")
    assert "".join(pieces) == "bcdefghi"
