"""Sleep, wake, swap, GPUs and explain by the client, with a real daemon."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from bullpen.client import (
    BullpenClient,
    Claim,
    ConnectionFailed,
    Event,
    Explanation,
    GpuReport,
    Instance,
    Refused,
    Swapped,
    UnexpectedAnswer,
    Verdict,
    wire,
)
from bullpen.client.target import Target
from bullpen.errors import BullpenError
from tests.support.daemon import Daemon

TARGET = Target("http://daemon:1")


@pytest.fixture(scope="module")
def gpu_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("gpus"), mock_gpus=True, mock_gpu_count=1) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def client(gpu_daemon: Daemon) -> Iterator[BullpenClient]:
    # Its patience is short, so that a call that ought to be patient and is not would fail.
    with BullpenClient(gpu_daemon.url, timeout=2.0) as client:
        yield client
        client.delete_all()


def ready(client: BullpenClient, name: str, **fields: object) -> Instance:
    client.create("--model m", instance_id=name, **fields)  # type: ignore[arg-type]
    return client.wait_until_ready(name, timeout=30)


def test_create_with_every_field(client: BullpenClient) -> None:
    created = client.create(
        "--model m",
        gpus=1,
        gpu_share=0.5,
        sleep="engine",
        sleep_after="5m",
        discard_after=600,
        stop_after=7200.5,
        pin=True,
        priority=2,
        warm_up={"path": "/v1/completions", "body": {"model": "m", "prompt": "hello", "max_tokens": 1}},
    )
    expected = {"gpus": 1, "gpu_share": 0.5, "sleep": "engine", "sleep_after": 300, "discard_after": 600}
    assert expected.items() <= created.document.items()
    assert (created.document["stop_after"], created.document["pin"], created.document["priority"]) == (7200.5, True, 2)
    assert created.assigned_gpus == ["GPU-0"]
    assert created.activity is not None and created.activity.doing == "start"


def test_sleep_and_wake(client: BullpenClient) -> None:
    assert ready(client, "a", gpus=1).can_sleep
    asleep = client.sleep("a")
    assert (asleep.state, asleep.sleep_level, asleep.ended) == ("sleeping", 1, False)
    assert asleep.reason
    deadline = time.monotonic() + 10
    while "level_1" not in client.get("a").memory:  # nobody waits for what is measured
        assert time.monotonic() < deadline
    assert client.sleep("a", level=2, drain=0).sleep_level == 2
    awake = client.wake("a")
    assert (awake.state, awake.sleep_level, awake.activity) == ("ready", None, None)
    assert awake.memory["level_1"].gpu_mib == 64


def test_sleep_that_refuses_requests(client: BullpenClient) -> None:
    url = ready(client, "a", gpus=1).url
    client.sleep("a", refuse=True)
    assert httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x"}).status_code == 503


def test_emulated_sleep(client: BullpenClient) -> None:
    ready(client, "a", sleep="emulate")
    assert client.sleep("a").sleep_emulated
    assert not client.wake("a").sleep_emulated


@pytest.mark.parametrize("instance_id", ["b", "", "..", "a/b", "watch"])
def test_nobody_of_that_id(client: BullpenClient, instance_id: str) -> None:
    for call in (client.sleep, client.wake, client.explain):
        with pytest.raises(BullpenError):
            call(instance_id)


def test_refusals_carry_status_and_sentence(client: BullpenClient) -> None:
    ready(client, "a", gpus=1, sleep="off")
    with pytest.raises(Refused, match="sleep: engine") as cannot:
        client.sleep("a")
    with pytest.raises(Refused, match="level") as wrong:
        client.sleep("a", level=7)
    with pytest.raises(Refused, match="'a'") as stands:
        client.swap({"options": "--model n", "gpus": 1})
    with pytest.raises(Refused, match="'nobody'") as nobody:
        client.swap("nobody")
    assert [caught.value.status for caught in (cannot, wrong, stands, nobody)] == [409, 422, 409, 404]


def test_swap_of_ids(client: BullpenClient) -> None:
    ready(client, "a", gpus=1)
    client.sleep("a")
    ready(client, "b", gpus=1)
    swapped = client.swap("a", "b", sleep_level=2, drain=1)
    assert (swapped.incoming.instance_id, swapped.incoming.state) == ("a", "ready")
    assert [(one.instance_id, one.sleep_level) for one in swapped.outgoing] == [("b", 2)]
    assert swapped.stages["done"] == swapped.seconds
    assert [one.instance_id for one in client.swap("b", ["a"]).outgoing] == ["a"]


def test_swap_of_a_new_one(client: BullpenClient) -> None:
    ready(client, "a", gpus=1)
    swapped = client.swap({"options": "--model n", "instance_id": "n", "gpus": 1}, refuse=True)
    assert (swapped.incoming.instance_id, swapped.incoming.model) == ("n", "n")
    assert client.get("a").state == "sleeping"


def test_swap_is_waited_for_as_long_as_it_takes(gpu_daemon: Daemon) -> None:
    with BullpenClient(gpu_daemon.url, timeout=0.5) as client:
        slow = {"BULLPEN_SIM_START_SECONDS": "1.2"}
        swapped = client.swap({"options": "--model n", "gpus": 1, "env_vars": slow})
        assert swapped.seconds > 0.5
        client.delete_all()


def test_progress_of_a_swap_by_the_watch(client: BullpenClient) -> None:
    ready(client, "a", gpus=1)
    stages: list[str] = []
    opened, heard = threading.Event(), threading.Event()

    def listen() -> None:
        for event in client.watch(fine=True):
            opened.set()
            if event.swap is not None:
                assert event.instance is None
                assert (event.swap.incoming, event.swap.outgoing, event.swap.error) == ("n", ["a"], None)
                stages.append(event.swap.stage)
                if event.swap.stage == "done":
                    break
        heard.set()

    threading.Thread(target=listen, daemon=True).start()
    assert opened.wait(10)
    client.swap({"options": "--model n", "instance_id": "n", "gpus": 1})
    assert heard.wait(10)
    assert stages == ["out", "in", "done"]


def test_gpus(client: BullpenClient) -> None:
    ready(client, "a", gpus=1)
    client.sleep("a")
    report = client.gpus()
    (gpu,) = report.gpus
    assert (gpu.index, gpu.uuid, gpu.problem) == (0, "GPU-0", None)
    assert gpu.free_mib is not None and 0 < gpu.free_mib < gpu.memory_mib
    assert (gpu.awake, gpu.coming, gpu.foreign) == ([], [], [])
    assert gpu.asleep == [Claim("a", None, 64)]
    assert report.host.budget_mib is None and report.host.available_mib


def test_explain(client: BullpenClient) -> None:
    ready(client, "a", gpus=1, stop_after=3600)
    client.sleep("a")
    client.wake("a")
    found = client.explain("a")
    assert (found.instance_id, found.state, found.waits_for) == ("a", "ready", None)
    assert found.summary and len(found.notes) >= 2
    assert found.next_step is not None and found.next_step.to == "stopped"
    assert found.works["level_1"] is not None and found.works["level_1"].works


def test_judge(client: BullpenClient) -> None:
    ready(client, "a", gpus=1)
    found = client.judge("a", 2, works=False, why="it is slow")
    assert found["level_2"] is not None and (found["level_2"].works, found["level_2"].why) == (False, "it is slow")
    assert client.explain("a").works == found
    with pytest.raises(Refused, match="level") as wrong:
        client.judge("a", 3, works=True, why="x")
    with pytest.raises(Refused, match="'nobody'") as nobody:
        client.judge("nobody", 1, works=True, why="x")
    assert [caught.value.status for caught in (wrong, nobody)] == [422, 404]
    client.judge("a", 2, works=True, why="others rely on it")


# -- without a connection ------------------------------------------------------------------------------------------


def test_bodies() -> None:
    body = wire.swap_body("a", ("b", "c"), None, None, refuse=False)
    assert json.loads(body) == {
        "in": "a",
        "out": ["b", "c"],
        "sleep_level": None,
        "drain": None,
        "new_requests": "hold",
    }
    body = wire.swap_body({"options": "\udcff"}, "auto", 1, 2.5, refuse=True)
    assert json.loads(body)["in"] == {"options": "\udcff"}
    assert wire.sleep_params(None, None, refuse=False) == {}
    assert wire.sleep_params(2, 0.0, refuse=True) == {"level": "2", "drain": "0.0", "new_requests": "refuse"}


@pytest.mark.parametrize("document", [{}, {"in": "a"}, {"in": None, "out": []}])
def test_answer_that_is_no_swap(document: dict[str, object]) -> None:
    with pytest.raises(UnexpectedAnswer):
        wire.read_swapped(TARGET, document)


def test_unknown_and_missing_fields_are_tolerated() -> None:
    report = GpuReport.read({"gpus": [{"index": 1, "new": 1, "asleep": [{"instance_id": "a", "new": 2}]}], "new": 3})
    assert report.gpus[0].asleep[0].instance_id == "a"
    assert GpuReport.read({}).host.available_mib is None
    found = Explanation.read({"works": {"level_1": None, "level_3": {"works": True, "new": 1}}, "notes": [{"new": 1}]})
    assert found.works == {"level_1": None, "level_3": Verdict(True)}
    assert (found.next_step, found.notes[0].text) == (None, "")
    swapped = Swapped.read({"in": {"instance_id": "a"}, "new": 1})
    assert (swapped.incoming.instance_id, swapped.outgoing) == ("a", [])
    event = Event.read({"type": "SWAP", "object": {"in": "a", "stage": "later", "new": 1}})
    assert event.instance is None and event.swap is not None and event.swap.stage == "later"
    assert Event.read({"type": "HEARTBEAT", "object": {"revision": 1}}).swap is None


def test_nobody_there() -> None:
    with BullpenClient("http://127.0.0.1:9") as client:
        for call in (lambda: client.sleep("a"), lambda: client.swap("a"), client.gpus):
            with pytest.raises(ConnectionFailed):
                call()
