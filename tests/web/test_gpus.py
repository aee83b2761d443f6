"""GPUs over HTTP: the report, and the fields of a create that claim them and say when an instance steps down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, wait_until
from tests.web.calls import INSTANCES, problems, raw

GPUS = "/v2/vllm/gpus"
MEMORY_MIB = 8192
NEEDLE = "s3cr3t-needle"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with two small mock GPUs and a budget of host memory."""
    state_dir = tmp_path_factory.mktemp("small") / "state"
    settings: dict[str, Any] = {"mock_gpus": True, "mock_gpu_count": 2, "mock_gpu_memory": MEMORY_MIB}
    with Daemon(state_dir, host_memory_budget="2GiB", **settings) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def daemon(small: Daemon) -> Iterator[Daemon]:
    yield small
    assert small.http.delete(INSTANCES).status_code == 200


def report(daemon: Daemon) -> dict[str, Any]:
    reply = daemon.http.get(GPUS)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def ready(daemon: Daemon, name: str, **fields: Any) -> dict[str, Any]:
    daemon.create(instance_id=name, **fields)
    return daemon.wait_state(name, "ready")


def post(daemon: Daemon, **fields: Any) -> Any:
    content = json.dumps({"options": "--model m", **fields})
    return daemon.http.post(INSTANCES, content=content, headers={"Content-Type": "application/json"})


# -- the report ----------------------------------------------------------------------------------------------------


def test_gpus_that_nobody_uses(daemon: Daemon) -> None:
    found = report(daemon)
    assert set(found) == {"gpus", "host"}
    assert [(gpu["index"], gpu["uuid"], gpu["free_mib"]) for gpu in found["gpus"]] == [
        (0, "GPU-0", MEMORY_MIB),
        (1, "GPU-1", MEMORY_MIB),
    ]
    for gpu in found["gpus"]:
        assert (gpu["memory_mib"], gpu["parent"], gpu["problem"]) == (MEMORY_MIB, None, None)
        assert not any(gpu[key] for key in ("awake", "coming", "asleep", "foreign"))
    assert (found["host"]["asleep_mib"], found["host"]["budget_mib"]) == (0, 2048)
    assert found["host"]["available_mib"] > 0


def test_who_is_awake_and_who_sleeps(daemon: Daemon) -> None:
    environment = {"BULLPEN_SIM_AWAKE_MIB": 2000, "BULLPEN_SIM_ASLEEP_MIB": 100}
    ready(daemon, "a", gpu_uuids=["GPU-0"], env_vars=environment)
    assert daemon.http.post(f"{INSTANCES}/a/sleep").status_code == 200
    ready(daemon, "b", gpu_uuids=["GPU-0"], env_vars=environment)
    wait_until(lambda: report(daemon)["gpus"][0]["awake"][0]["mib"] == 2000)  # it is measured once it is ready
    first, second = report(daemon)["gpus"]
    assert first["awake"] == [{"instance_id": "b", "share": None, "mib": 2000}]
    assert first["asleep"] == [{"instance_id": "a", "share": None, "mib": 100}]
    assert first["free_mib"] == MEMORY_MIB - 2100
    assert first["foreign"] == []
    assert second["awake"] == second["asleep"] == []


def test_who_is_coming(daemon: Daemon) -> None:
    slow = {"BULLPEN_SIM_START_SECONDS": "2"}
    for name in ("a", "b"):
        daemon.create(instance_id=name, gpu_uuids=["GPU-0"], gpu_share=0.5, env_vars=slow)
    first = report(daemon)["gpus"][0]
    assert [claim["instance_id"] for claim in first["awake"]] == ["a"]
    assert [(claim["instance_id"], claim["share"]) for claim in first["coming"]] == [("b", 0.5)]
    waiting = daemon.instance("b")
    assert "'a'" in waiting["activity"]["waits_for"]


def test_strangers_are_named(daemon: Daemon) -> None:
    (file,) = Path(daemon.state_dir).rglob("1/total")
    stranger = file.with_name(str(os.getpid()))
    stranger.write_text("500\n")
    try:
        gpu = report(daemon)["gpus"][1]
    finally:
        stranger.unlink()
    assert [(one["pid"], one["mib"]) for one in gpu["foreign"]] == [(os.getpid(), 500)]
    assert gpu["foreign"][0]["name"]
    assert gpu["free_mib"] == MEMORY_MIB - 500


def test_gpu_that_cannot_be_read(daemon: Daemon) -> None:
    (file,) = Path(daemon.state_dir).rglob("1/total")
    text = file.read_text()
    file.write_text("?")
    try:
        first, second = report(daemon)["gpus"]
    finally:
        file.write_text(text)
    assert first["problem"] is None
    assert second["free_mib"] is None and second["problem"]


def test_no_gpus(tmp_path: Path) -> None:
    with Daemon(tmp_path / "state", mock_gpus=True, mock_gpu_count=0) as daemon:
        assert report(daemon.wait_ready())["gpus"] == []


# -- claims --------------------------------------------------------------------------------------------------------


def test_gpus_of_bullpens_choice(daemon: Daemon) -> None:
    assert daemon.create(instance_id="a", gpus=1)["assigned_gpus"] == ["GPU-0"]
    created = daemon.create(instance_id="b", gpus=1)
    assert (created["gpus"], created["assigned_gpus"]) == (1, ["GPU-1"])
    assert "gpu_uuids" not in created
    reply = post(daemon, gpus=1)
    assert reply.status_code == 409
    assert "'a'" in reply.json()["detail"] and "'b'" in reply.json()["detail"]


def test_gpu_by_index_comes_back_as_given(daemon: Daemon) -> None:
    created = daemon.create(gpu_uuids=["1"])
    assert (created["gpu_uuids"], created["assigned_gpus"]) == (["1"], ["GPU-1"])
    reply = post(daemon, gpu_uuids=["GPU-1"])
    assert reply.status_code == 409
    assert created["instance_id"] in reply.json()["detail"]


def test_shares_of_one_gpu(daemon: Daemon) -> None:
    for name in ("a", "b"):
        assert ready(daemon, name, gpu_uuids=["GPU-0"], gpu_share=0.5)["gpu_share"] == 0.5
    reply = post(daemon, gpu_uuids=["GPU-0"], gpu_share=0.1)
    assert reply.status_code == 409
    assert "GPU-0" in reply.json()["detail"]


def test_more_gpus_than_there_are(daemon: Daemon) -> None:
    reply = post(daemon, gpus=3)
    assert reply.status_code in (409, 422)
    assert "2" in str(reply.json()["detail"])


# -- fields of a create --------------------------------------------------------------------------------------------


def test_fields_come_back_as_given(daemon: Daemon) -> None:
    given: dict[str, Any] = {
        "gpus": 1,
        "gpu_share": 0.25,
        "sleep": "engine",
        "sleep_after": 60,
        "discard_after": 120.5,
        "stop_after": 3600,
        "pin": True,
        "priority": -3,
        "warm_up": {"path": "/v1/completions", "body": {"model": "m", "prompt": "ü", "max_tokens": 1}},
    }
    created = daemon.create(instance_id="a", **given)
    for document in (created, daemon.instance("a")):
        assert {name: document[name] for name in given} == given


def test_times_as_text(daemon: Daemon) -> None:
    created = daemon.create(gpus=1, sleep_after="90s", discard_after="5m", stop_after="1h30m")
    assert [created[name] for name in ("sleep_after", "discard_after", "stop_after")] == [90, 300, 5400]


def test_fields_left_out_or_null_do_not_come_back(daemon: Daemon) -> None:
    names = ("gpus", "gpu_share", "sleep", "sleep_after", "discard_after", "stop_after", "pin", "priority", "warm_up")
    null: dict[str, Any] = dict.fromkeys(names)
    assert not set(null) & set(daemon.create())
    assert not set(null) & set(daemon.create(**null))


def test_warm_up_is_sent(daemon: Daemon) -> None:
    body = {"model": "m", "prompt": "warm", "max_tokens": 3}
    ready(daemon, "a", warm_up={"path": "/v1/completions", "body": body})
    assert '"POST /v1/completions HTTP/1.1" 200' in daemon.log("a")


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"gpus": 0}, ["gpus"]),
        ({"gpus": -1}, ["gpus"]),
        ({"gpus": 1025}, ["gpus"]),
        ({"gpus": 1.5}, ["gpus"]),
        ({"gpus": True}, ["gpus"]),
        ({"gpus": "1"}, ["gpus"]),
        ({"gpus": 10**400}, ["gpus"]),
        ({"gpus": 1, "gpu_uuids": ["GPU-0"]}, ["gpus"]),
        ({"gpu_uuids": ["GPU-0", "0"]}, ["gpu_uuids"]),
        ({"gpu_uuids": ["7"]}, ["gpu_uuids"]),
        ({"gpu_uuids": [""]}, ["gpu_uuids"]),
        ({"gpus": 1, "gpu_share": 0}, ["gpu_share"]),
        ({"gpus": 1, "gpu_share": 1.01}, ["gpu_share"]),
        ({"gpus": 1, "gpu_share": True}, ["gpu_share"]),
        ({"gpu_share": 0.5}, ["gpu_share"]),
        ({"sleep": NEEDLE}, ["sleep"]),
        ({"sleep": True}, ["sleep"]),
        ({"sleep_after": -1}, ["sleep_after"]),
        ({"sleep_after": NEEDLE}, ["sleep_after"]),
        ({"sleep_after": ""}, ["sleep_after"]),
        ({"sleep_after": "5 minutes"}, ["sleep_after"]),
        ({"sleep_after": 1e300}, ["sleep_after"]),
        ({"sleep_after": True}, ["sleep_after", "float"]),
        ({"sleep_after": [5]}, ["sleep_after", "float"]),
        ({"discard_after": "9" * 400}, ["discard_after"]),
        ({"stop_after": "\ud800"}, ["stop_after"]),
        ({"sleep_after": 10, "stop_after": 5}, ["stop_after"]),
        ({"pin": 1}, ["pin"]),
        ({"pin": "yes"}, ["pin"]),
        ({"priority": 0.5}, ["priority"]),
        ({"priority": 10**30}, ["priority"]),
        ({"priority": NEEDLE}, ["priority"]),
        ({"warm_up": NEEDLE}, ["warm_up"]),
        ({"warm_up": {"path": f"http://{NEEDLE}/"}}, ["warm_up"]),
        ({"warm_up": {"path": "/a\r\nb"}}, ["warm_up"]),
        ({"warm_up": {"body": [NEEDLE]}}, ["warm_up", "body"]),
        ({"warm_up": {"body": {"a": "\ud800"}}}, ["warm_up", "body"]),
        ({"warm_up": {"body": {"a": "x" * 100_000}}}, ["warm_up"]),
        ({"warm_up": {"headers": {}}}, ["warm_up", "headers"]),
    ],
)
def test_field_that_can_never_work(daemon: Daemon, fields: dict[str, Any], place: list[str]) -> None:
    reply = post(daemon, **fields)
    assert problems(reply)[0]["loc"] == ["body", *place]
    assert NEEDLE not in reply.text
    assert daemon.http.get(INSTANCES).json()["total_instances"] == 0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("gpu_share", "%s"), ("sleep_after", "%s"), ("priority", "%s"), ("warm_up", '{"body": {"a": [%s]}}')],
)
def test_number_that_is_none_in_json(daemon: Daemon, field: str, value: str, number: str) -> None:
    body = f'{{"options": "--model m", "gpus": 1, "{field}": {value % number}}}'
    status, reply = raw(daemon, "POST", INSTANCES, body.encode())
    assert status == 422, reply
    assert json.loads(reply)["detail"][0]["loc"][1] == field


def test_deep_body_of_a_warm_up(daemon: Daemon) -> None:
    for depth in (100, 300, 900):
        body = '{"options": "--model m", "warm_up": {"body": {"a": ' + "[" * depth + "]" * depth + "}}}"
        status, reply = raw(daemon, "POST", INSTANCES, body.encode())
        assert status in (201, 422), reply
