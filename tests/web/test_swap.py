"""Swap over HTTP: both forms of what comes in, all forms of what goes out, refusals, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES, problems, watching

SWAP = "/v2/vllm/swap"
NEEDLE = "s3cr3t-needle"
NEW = {"options": "--model n"}


def swap(daemon: Daemon, **body: Any) -> httpx.Response:
    return daemon.http.post(SWAP, json=body)


def done(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def refusal(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["detail"])


def states(daemon: Daemon) -> dict[str, str]:
    return {one["instance_id"]: one["state"] for one in daemon.http.get(INSTANCES).json()["instances"]}


def put(daemon: Daemon, *names: str, **fields: Any) -> None:
    """Instances on GPU-0, one after the other; all but the last one sleep."""
    for earlier, name in zip(("", *names), names, strict=False):
        if earlier:
            assert daemon.http.post(f"{INSTANCES}/{earlier}/sleep").status_code == 200
        daemon.create(instance_id=name, gpu_uuids=["GPU-0"], **fields)
        daemon.wait_state(name, "ready")


def test_one_for_another_and_back(shared: Daemon) -> None:
    put(shared, "a", "b")
    first = done(swap(shared, **{"in": "a", "out": "b"}))
    assert set(first) == {"swap", "in", "out", "seconds", "stages"}
    assert (first["in"]["instance_id"], first["in"]["state"]) == ("a", "ready")
    assert [(one["instance_id"], one["state"], one["sleep_level"]) for one in first["out"]] == [("b", "sleeping", 1)]
    assert list(first["stages"]) == ["out", "in", "done"]
    assert 0 == first["stages"]["out"] <= first["stages"]["in"] <= first["stages"]["done"] == first["seconds"]
    second = done(swap(shared, **{"in": "b", "out": ["a"], "sleep_level": 2}))
    assert second["swap"] > first["swap"]
    assert second["out"][0]["sleep_level"] == 2
    assert states(shared) == {"a": "sleeping", "b": "ready"}


def test_configuration_comes_in(shared: Daemon) -> None:
    put(shared, "a")
    reply = done(swap(shared, **{"in": {**NEW, "instance_id": "n", "gpu_uuids": ["GPU-0"]}, "out": "a"}))
    assert (reply["in"]["instance_id"], reply["in"]["model"], reply["in"]["state"]) == ("n", "n", "ready")
    assert states(shared) == {"a": "sleeping", "n": "ready"}


def test_configuration_gets_an_id(shared: Daemon) -> None:
    put(shared, "a")
    reply = done(swap(shared, **{"in": {**NEW, "gpu_uuids": ["GPU-0"]}, "out": "a"}))
    assert states(shared) == {"a": "sleeping", reply["in"]["instance_id"]: "ready"}


@pytest.mark.parametrize("out", [{}, {"out": "auto"}])
def test_those_in_the_way_go(shared: Daemon, out: dict[str, str]) -> None:
    put(shared, "a", "b")
    shared.create(instance_id="beside", gpu_uuids=["GPU-1"])
    shared.wait_state("beside", "ready")
    reply = done(swap(shared, **{"in": "a", **out}))
    assert [one["instance_id"] for one in reply["out"]] == ["b"]
    assert states(shared) == {"a": "ready", "b": "sleeping", "beside": "ready"}


def test_nobody_goes_where_there_is_room(shared: Daemon) -> None:
    put(shared, "a")
    reply = done(swap(shared, **{"in": {**NEW, "gpus": 1}}))
    assert (reply["out"], reply["in"]["assigned_gpus"]) == ([], ["GPU-1"])


def test_lowest_priority_goes_first(shared: Daemon) -> None:
    for name, priority in (("high", 5), ("low", -5)):
        shared.create(instance_id=name, gpus=1, priority=priority)
        shared.wait_state(name, "ready")
    reply = done(swap(shared, **{"in": {**NEW, "gpus": 1}}))
    assert [one["instance_id"] for one in reply["out"]] == ["low"]


def test_several_go(shared: Daemon) -> None:
    for name in ("a", "b"):
        shared.create(instance_id=name, gpus=1)
        shared.wait_state(name, "ready")
    reply = done(swap(shared, **{"in": {**NEW, "gpus": 2}, "out": ["a", "b", "a"]}))
    assert [one["instance_id"] for one in reply["out"]] == ["a", "b"]
    assert reply["in"]["assigned_gpus"] == ["GPU-0", "GPU-1"]


def test_swapped_in_already(shared: Daemon) -> None:
    put(shared, "a", "b")
    for _ in range(2):
        reply = done(swap(shared, **{"in": "a", "out": "b"}))
    assert (reply["in"]["state"], reply["out"]) == ("ready", [])
    assert states(shared) == {"a": "ready", "b": "sleeping"}


def test_emulated_sleep(shared: Daemon) -> None:
    put(shared, "a", sleep="emulate")
    reply = done(swap(shared, **{"in": {**NEW, "instance_id": "n", "gpu_uuids": ["GPU-0"], "sleep": "emulate"}}))
    assert reply["out"][0]["sleep_emulated"] is True
    assert done(swap(shared, **{"in": "a"}))["out"][0]["instance_id"] == "n"


def test_new_requests_as_the_caller_chose(shared: Daemon) -> None:
    put(shared, "a", "b")
    reply = done(swap(shared, **{"in": "a", "out": "b", "drain": 1, "new_requests": "refuse"}))
    prompt = {"model": "m", "prompt": "hello", "max_tokens": 2}
    assert httpx.post(f"{reply['out'][0]['url']}/v1/completions", json=prompt).status_code == 503
    assert httpx.post(f"{reply['in']['url']}/v1/completions", json=prompt).status_code == 200


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{"in": "nobody"}, {"in": "nobody", "out": "a"}, {"in": "a", "out": "nobody"}, {"in": NEW, "out": "nobody"}]
)
def test_nobody_of_that_id(shared: Daemon, body: dict[str, Any]) -> None:
    put(shared, "a")
    assert "'nobody'" in refusal(swap(shared, **body), 404)
    assert states(shared) == {"a": "ready"}


def test_owner_that_is_pinned_is_named(shared: Daemon) -> None:
    put(shared, "a", pin=True)
    sentence = refusal(swap(shared, **{"in": {**NEW, "gpu_uuids": ["GPU-0"]}}), 409)
    assert "'a'" in sentence and "pinned" in sentence
    done(swap(shared, **{"in": {**NEW, "gpu_uuids": ["GPU-0"]}, "out": "a"}))


def test_owner_that_cannot_sleep_is_named(shared: Daemon) -> None:
    put(shared, "a", sleep="off")
    for out in ("auto", "a"):
        assert "'a'" in refusal(swap(shared, **{"in": {**NEW, "gpu_uuids": ["GPU-0"]}, "out": out}), 409)
    assert states(shared) == {"a": "ready"}


def test_owner_that_was_not_named_stays(shared: Daemon) -> None:
    put(shared, "a", "b")
    shared.create(instance_id="beside", gpu_uuids=["GPU-1"])
    shared.wait_state("beside", "ready")
    assert "'b'" in refusal(swap(shared, **{"in": "a", "out": "beside"}), 409)
    assert states(shared) == {"a": "sleeping", "b": "ready", "beside": "ready"}


def test_id_that_exists(shared: Daemon) -> None:
    put(shared, "a")
    assert "'a'" in refusal(swap(shared, **{"in": {**NEW, "instance_id": "a"}, "out": []}), 409)


def test_in_and_out_at_once(shared: Daemon) -> None:
    put(shared, "a")
    assert problems(swap(shared, **{"in": "a", "out": ["a"]}))[0]["loc"] == ["body", "out"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "in"]),
        ({"in": None}, ["body", "in", "configuration"]),
        ({"in": 5}, ["body", "in", "configuration"]),
        ({"in": [NEEDLE]}, ["body", "in", "configuration"]),
        ({"in": {}}, ["body", "in", "configuration", "options"]),
        ({"in": {**NEW, NEEDLE[:3]: NEEDLE}}, ["body", "in", "configuration", NEEDLE[:3]]),
        ({"in": {**NEW, "gpus": 0}}, ["body", "in", "configuration", "gpus"]),
        ({"in": {**NEW, "instance_id": ""}}, ["body", "in", "configuration", "instance_id"]),
        ({"in": {**NEW, "instance_id": f"/{NEEDLE}"}}, ["body", "in", "instance_id"]),
        ({"in": {**NEW, "env_vars": {"LD_PRELOAD": NEEDLE}}}, ["body", "in", "env_vars"]),
        ({"in": {"options": "--model n --bogus"}}, ["body", "in", "options"]),
        ({"in": {"options": "--model 'n"}}, ["body", "in", "options"]),
        ({"in": {**NEW, "gpu_uuids": ["GPU-9"]}}, ["body", "in", "gpu_uuids"]),
        ({"in": "a", "incoming": NEEDLE}, ["body", "incoming"]),
        ({"incoming": "a"}, ["body", "in"]),
        ({"in": "a", "out": 5}, ["body", "out", "str"]),
        ({"in": "a", "out": None}, ["body", "out", "str"]),
        ({"in": "a", "out": [5]}, ["body", "out", "str"]),
        ({"in": "a", "sleep_level": 3}, ["body", "sleep_level"]),
        ({"in": "a", "sleep_level": "1"}, ["body", "sleep_level"]),
        ({"in": "a", "sleep_level": True}, ["body", "sleep_level"]),
        ({"in": "a", "drain": -1}, ["body", "drain"]),
        ({"in": "a", "drain": 10**400}, ["body", "drain"]),
        ({"in": "a", "new_requests": NEEDLE}, ["body", "new_requests"]),
        ({"in": "a", "new_requests": None}, ["body", "new_requests"]),
    ],
)
def test_body_that_makes_no_sense(shared: Daemon, body: dict[str, Any], place: list[Any]) -> None:
    put(shared, "a")
    reply = swap(shared, **body)
    assert problems(reply)[0]["loc"] == place
    assert NEEDLE not in reply.text
    assert states(shared) == {"a": "ready"}


@pytest.mark.parametrize("text", ["\ud800", "", "a/b", "\0", "x" * 10_000])
def test_text_that_is_no_id(shared: Daemon, text: str) -> None:
    for body in ({"in": text}, {"in": NEW, "out": [text]}, {"in": NEW, "out": text}):
        content = json.dumps(body)
        reply = shared.http.post(SWAP, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 404, reply.text


# -- the way back --------------------------------------------------------------------------------------------------


def test_failed_start_is_taken_back(shared: Daemon) -> None:
    put(shared, "a")
    new = {**NEW, "instance_id": "n", "gpu_uuids": ["GPU-0"], "env_vars": {"BULLPEN_SIM_FAIL": "start"}}
    sentence = refusal(swap(shared, **{"in": new, "out": "a"}), 500)
    assert "the swap was taken back" in sentence
    assert "'a' is ready" in sentence
    assert states(shared)["a"] == "ready"


def test_failed_sleep_is_taken_back(shared: Daemon) -> None:
    # A failed sleep is remembered of the model, and would count in other tests.
    put(shared, "a", options="--model broken", env_vars={"BULLPEN_SIM_FAIL": "sleep"})
    sentence = refusal(swap(shared, **{"in": {**NEW, "instance_id": "n", "gpu_uuids": ["GPU-0"]}, "out": "a"}), 500)
    assert "the swap was taken back" in sentence
    assert states(shared) == {"a": "ready"}


# -- events --------------------------------------------------------------------------------------------------------


def stages(lines: list[dict[str, Any]]) -> list[str]:
    return [line["object"]["stage"] for line in lines if line["type"] == "SWAP"]


def test_progress_is_told(shared: Daemon) -> None:
    put(shared, "a", "b")
    with watching(shared, events="all") as watch:
        reply = done(swap(shared, **{"in": "a", "out": "b"}))
        lines: list[dict[str, Any]] = []
        while stages(lines)[-1:] != ["done"]:
            lines.append(watch.next())
    told = [line["object"] for line in lines if line["type"] == "SWAP"]
    assert [one["stage"] for one in told] == ["out", "in", "done"]
    assert {(one["swap"], one["in"], *one["out"], one["error"]) for one in told} == {(reply["swap"], "a", "b", None)}
    assert told[-1]["stages"] == reply["stages"]
    assert all(isinstance(one["revision"], int) for one in told)


def test_plain_watch_hears_nothing_of_it(shared: Daemon) -> None:
    put(shared, "a", "b")
    with watching(shared) as watch:
        watch.next(), watch.next()
        done(swap(shared, **{"in": "a", "out": "b"}))
        shared.delete("a")
        assert watch.next()["type"] == "DELETED"


def test_way_back_is_told(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(mock_gpus=True, mock_gpu_count=1).wait_warm()
    put(daemon, "a")
    with watching(daemon, events="all") as watch:
        new = {**NEW, "gpus": 1, "env_vars": {"BULLPEN_SIM_FAIL": "start"}}
        refusal(swap(daemon, **{"in": new, "out": "a"}), 500)
        lines: list[dict[str, Any]] = []
        while stages(lines)[-1:] != ["done"]:
            lines.append(watch.next())
    assert stages(lines) == ["out", "in", "back", "done"]
    assert [line["object"]["error"] is None for line in lines if line["type"] == "SWAP"] == [True, True, False, False]
