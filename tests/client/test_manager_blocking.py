"""The synchronous twin, with a box in memory."""

from __future__ import annotations

import inspect
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bullpen.client.blocking import SyncVLLMManager
from bullpen.client.errors import ClientError
from bullpen.client.launch_errors import LaunchTimedOut, NotFound
from bullpen.client.launches import LaunchResponse
from bullpen.client.manager import VLLMManager
from tests.client.box import URL, Box
from tests.sim.simulator import wait_for

PATIENCE = 10.0


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
def manager(box: Box) -> Iterator[SyncVLLMManager]:
    with SyncVLLMManager(URL, transport=box.transport) as manager:
        yield manager


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_it_has_all_that_the_asynchronous_one_has() -> None:
    assert public(SyncVLLMManager) == public(VLLMManager)
    for name in public(VLLMManager) - {"complete", "grpc_address", "close"}:
        ours, theirs = getattr(SyncVLLMManager, name), getattr(VLLMManager, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


def test_run_and_progress(manager: SyncVLLMManager, box: Box) -> None:
    seen: list[LaunchResponse] = []

    def progress(launch: LaunchResponse) -> None:
        seen.append(launch)
        box.become(state="ready")

    with manager.run("m", on_progress=progress) as launch:
        assert launch.state == "ready"
        assert manager.status(launch.launch_id) == launch
        assert box.calls[-1] == "GET /status/one"
    assert box.calls[-1] == "POST /stop/one"
    assert [one.state for one in seen] == ["bootstrapping", "ready"]


@pytest.mark.parametrize("problem", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_block_that_fails_stops_the_launch(manager: SyncVLLMManager, box: Box, problem: BaseException) -> None:
    box.after_call = lambda call: box.launches["one"].update(state="ready") if call == "POST /launch" else None
    with pytest.raises(type(problem)) as caught, manager.run("m"):
        raise problem
    assert caught.value is problem
    assert box.calls[-1] == "POST /stop/one"
    assert manager.status("one").state == "stopped"  # the client still works


def test_interrupt_while_it_waits_stops_the_launch_first(manager: SyncVLLMManager, box: Box) -> None:
    def interrupt(call: str) -> None:
        if call == "GET /status/one":
            box.after_call = lambda _: None  # a second one would not wait
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    box.after_call = interrupt
    with pytest.raises(KeyboardInterrupt), manager.run("m"):
        raise AssertionError("it is not ready")
    assert box.calls[-1] == "POST /stop/one"


@pytest.mark.parametrize("moment", ["POST /launch", "GET /status/one", "POST /stop/one"])
def test_second_interrupt_does_not_end_the_stop(manager: SyncVLLMManager, box: Box, moment: str) -> None:
    """The first one comes at the moment, the next one while the launch is being stopped."""

    def interrupt(call: str) -> None:
        if call == "POST /launch" and moment == "POST /stop/one":
            box.launches["one"].update(state="ready")
        if call == moment:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if call == "POST /stop/one":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    box.after_call = interrupt
    with pytest.raises(KeyboardInterrupt), manager.run("m"):
        assert moment == "POST /stop/one"
    assert box.launches["one"]["state"] == "stopped"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_is_told_and_does_not_hang(manager: SyncVLLMManager) -> None:
    manager.launch("m")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # nothing but this may run here: the tests go on in the parent
        try:
            manager.status("one")
        except ClientError as problem:
            os.write(writing, str(problem).encode())
        finally:
            os._exit(0)
    try:
        os.close(writing)
        assert select.select([reading], [], [], PATIENCE)[0], "it hangs"
        assert "one in each process" in os.read(reading, 1000).decode()
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert manager.status("one").launch_id == "one"


def test_errors_are_the_same(manager: SyncVLLMManager) -> None:
    with pytest.raises(NotFound, match="Unknown launch_id: two"):
        manager.status("two")
    manager.launch("m")
    with pytest.raises(LaunchTimedOut):
        manager.wait_until_ready("one", timeout=0.02)


def test_streams(manager: SyncVLLMManager, box: Box) -> None:
    manager.launch("m")
    box.log = "abcdefg"
    following = manager.follow_logs("one", poll_interval=0.001)
    assert next(following).content == "abc"
    box.become(state="stopped")
    assert [piece.content for piece in following] == ["def", "g"]


def test_stream_that_is_left_ends(manager: SyncVLLMManager, box: Box) -> None:
    manager.launch("m")
    watch = manager.watch(fine=True)
    assert next(watch).type == "STATE"
    assert len(box.watchers) == 1
    watch.close()
    wait_for("the watch ends", lambda: not box.watchers)


def test_several_threads(manager: SyncVLLMManager, box: Box) -> None:
    manager.launch("m")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(manager.status("one").launch_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == ["one"] * 8


def test_closed_client_says_so_and_leaves_no_thread(box: Box) -> None:
    manager = SyncVLLMManager(URL, transport=box.transport)
    manager.launch("m")
    stream, other = manager.watch(), manager.watch()
    assert next(stream) and next(other)
    manager.close()
    manager.close()
    with pytest.raises(ClientError, match="was closed"):
        manager.stats()
    with pytest.raises(ClientError, match="was closed"):
        next(stream)
    other.close()
    assert "bullpen-client" not in {thread.name for thread in threading.enumerate()}


def test_call_in_a_thread_ends_when_the_client_is_closed(box: Box) -> None:
    manager = SyncVLLMManager(URL, transport=box.transport)
    manager.launch("m")
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            manager.wait_until_ready("one")
        except ClientError as problem:
            caught.append(problem)

    thread = threading.Thread(target=wait)
    opened = threading.Event()
    box.after_call = lambda call: opened.set() if "watch" in call else None
    thread.start()
    assert opened.wait(PATIENCE)
    manager.close()
    thread.join(PATIENCE)
    assert len(caught) == 1


def test_call_from_a_callback_is_refused_and_does_not_hang(manager: SyncVLLMManager) -> None:
    manager.launch("m")
    with pytest.raises(ClientError, match="its own callback"):
        manager.wait_until_ready("one", on_progress=lambda _: call_back(manager.stats), timeout=PATIENCE)


def call_back(call: Callable[[], Any]) -> None:
    call()
