"""Launches over HTTP: asked for, told of, read, stopped, remembered and forgotten."""

from __future__ import annotations

import base64
import json
import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from bullpen.node.launches import KEPT
from bullpen.node.logs import Piece
from bullpen.web import launch_models, launches
from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES, problems, raw

STATES = {"bootstrapping", "ready", "stopping", "stopped", "failed"}
CONTRACT = {"launch_id", "model", "gpu_ids", "task", "state", "created_at", "updated_at", "error"}
STOP_SECONDS = 5.0
"""What a stop may take, by contract."""


def launch(daemon: Daemon, model: str = "m", **fields: Any) -> dict[str, Any]:
    """Launch a model; that must succeed."""
    reply = daemon.http.post("/launch", json={"model": model, **fields})
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def status(daemon: Daemon, launch_id: str) -> dict[str, Any]:
    reply = daemon.http.get(f"/status/{launch_id}")
    assert reply.status_code == 200, reply.text
    document = dict(reply.json())
    launch_models.Launch.model_validate(document, extra="forbid")
    assert document["state"] in STATES
    return document


def reach(daemon: Daemon, launch_id: str, state: str = "ready") -> dict[str, Any]:
    """Wait until a launch is in a state."""
    wait_until(lambda: status(daemon, launch_id)["state"] == state, describe=lambda: str(status(daemon, launch_id)))
    return status(daemon, launch_id)


def stop(daemon: Daemon, launch_id: str) -> dict[str, Any]:
    """Stop a launch as the published client does: no body, no content type, and within the time."""
    with httpx.Client(base_url=daemon.url, timeout=STOP_SECONDS) as client:
        reply = client.post(f"/stop/{launch_id}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def log_of(daemon: Daemon, launch_id: str, offset: int = 0) -> str:
    """A launch's log from an offset on, all pieces of it."""
    text = ""
    while True:
        piece = daemon.http.get(f"/logs/{launch_id}", params={"offset": offset}).json()
        assert set(piece) == {"launch_id", "offset", "next_offset", "content"}
        if not piece["content"]:
            return text
        text, offset = text + piece["content"], piece["next_offset"]


# -- a launch ------------------------------------------------------------------------------------------------------


def test_life_of_a_launch(shared: Daemon) -> None:
    begun = launch(shared, " org/model ", gpu_ids=[0], extra_kwargs={"max_model_len": 256, "enforce_eager": True})
    name = begun["launch_id"]
    assert str(uuid.UUID(name)) == name
    assert set(begun) >= CONTRACT
    assert (begun["model"], begun["gpu_ids"], begun["task"]) == ("org/model", [0], "generate")
    assert (begun["state"], begun["error"], begun["phase"]) == ("bootstrapping", None, "preparing")
    for field in ("created_at", "updated_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", begun[field])
    ready = reach(shared, name)
    assert (ready["instance_id"], ready["instance_state"], ready["phase"], ready["progress"]) == (
        name,
        "ready",
        None,
        None,
    )
    assert datetime.fromisoformat(ready["updated_at"]) > datetime.fromisoformat(begun["updated_at"])
    assert is_alive(ready["pid"])
    assert httpx.get(f"{ready['url']}/v1/models").json()["data"][0]["id"] == "org/model"
    assert [one["launch_id"] for one in shared.http.get("/launch").json()] == [name]
    assert "max_model_len" in log_of(shared, name)

    stopped = stop(shared, name)
    assert (stopped["state"], stopped["error"], stopped["exit_code"]) == ("stopped", None, 0)
    assert not is_alive(ready["pid"])
    assert shared.http.get("/launch").json() == []
    assert status(shared, name) == stop(shared, name) == stopped, "a second stop changes nothing"
    assert "shutdown" in log_of(shared, name)
    assert shared.instance(name)["state"] == "stopped"
    shared.delete(name)
    assert shared.http.get(f"/status/{name}").status_code == 404


def test_options_of_a_launch(shared: Daemon) -> None:
    kwargs = {"served_model_name": "short", "enforce_eager": True, "enable_prefix_caching": False, "seed": None}
    name = launch(shared, "org/e", task="embed", extra_kwargs=kwargs)["launch_id"]
    assert reach(shared, name)["gpu_ids"] == [0, 1], "left out, it takes all"
    instance = shared.instance(name)
    assert instance["options"] == (
        "--model org/e --tensor-parallel-size 2 --runner pooling --convert embed --served-model-name short"
        " --enforce-eager --no-enable-prefix-caching"
    )
    assert instance["served_model_names"] == ["short"]
    assert status(shared, name)["task"] == "embed"


def test_secrets_do_not_come_back(shared: Daemon) -> None:
    name = launch(shared, extra_kwargs={"hf_token": "s3cret"})["launch_id"]
    assert "s3cret" not in shared.http.get(f"/status/{name}").text + shared.http.get(f"{INSTANCES}/{name}").text


def test_launch_before_the_engine_is_warm(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    begun = launch(daemon)
    assert begun["state"] == "bootstrapping"
    assert begun["gpu_ids"] == [], "this host has none"
    assert reach(daemon, begun["launch_id"])["url"]


def test_options_that_are_refused_make_it_fail(shared: Daemon) -> None:
    name = launch(shared, gpu_ids=[0], extra_kwargs={"port": "abc"})["launch_id"]
    failed = reach(shared, name, "failed")
    assert failed["error"] == "argument --port: invalid int value: 'abc'"
    assert failed["pid"] is None
    assert log_of(shared, name) == ""
    assert stop(shared, name) == failed, "a failed one stays failed"
    assert shared.instance(name)["state"] == "failed"
    launch(shared, gpu_ids=[0])


def test_a_server_that_fails_says_why(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(environment={"BULLPEN_SIM_FAIL": "start"}).wait_warm()
    failed = reach(daemon, launch(daemon)["launch_id"], "failed")
    assert failed["error"]
    assert failed["exit_code"] not in (0, None)
    assert "Traceback" in log_of(daemon, failed["launch_id"])
    assert daemon.http.get("/launch").json() == []


def test_instances_are_launches_too(shared: Daemon) -> None:
    shared.create("--model org/v2", instance_id="mine", gpu_uuids=["GPU-1"])
    ready = reach(shared, "mine")
    assert (ready["model"], ready["gpu_ids"], ready["task"]) == ("org/v2", [1], "generate")
    assert stop(shared, "mine")["state"] == "stopped"
    assert shared.instance("mine")["state"] == "stopped"


def test_a_launch_that_sleeps_is_not_ready(shared: Daemon) -> None:
    name = launch(shared, gpu_ids=[0])["launch_id"]
    reach(shared, name)
    assert shared.http.post(f"{INSTANCES}/{name}/sleep").status_code == 200
    asleep = status(shared, name)
    assert (asleep["state"], asleep["instance_state"], asleep["phase"]) == ("bootstrapping", "sleeping", "sleeping")
    assert [one["launch_id"] for one in shared.http.get("/launch").json()] == [name]
    assert shared.http.post(f"{INSTANCES}/{name}/wake").status_code == 200
    assert status(shared, name)["state"] == "ready"


def test_list_is_oldest_first(shared: Daemon) -> None:
    names = [launch(shared, gpu_ids=[index])["launch_id"] for index in (1, 0)]
    assert [one["launch_id"] for one in shared.http.get("/launch").json()] == names


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"model": "  "}, "model must be provided"),
        ({"model": "  ", "gpu_ids": [7]}, "model must be provided"),
        ({"model": "m", "gpu_ids": []}, "gpu_ids cannot be empty"),
        ({"model": "m", "gpu_ids": [0, 7, -1]}, "Requested GPUs are not available: [-1, 7]"),
        ({"model": "m", "gpu_count": 3}, "No GPUs available for launch: 3 are asked for, this host has 2"),
        ({"model": "m", "gpu_ids": [0], "gpu_count": 1}, "give gpu_ids to name GPUs, or gpu_count"),
        ({"model": "m", "extra_kwargs": {"two words": 1}}, "extra_kwargs has a name"),
    ],
)
def test_what_cannot_be_on_this_host(shared: Daemon, body: dict[str, Any], sentence: str) -> None:
    reply = shared.http.post("/launch", json=body)
    assert reply.status_code == 400
    assert reply.json()["detail"].startswith(sentence)
    assert shared.http.get("/launch").json() == []


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "model"]),
        ({"model": ""}, ["body", "model"]),
        ({"model": "s3cret\0"}, ["body", "model"]),
        ({"model": "m", "task": "s3cret"}, ["body", "task"]),
        ({"model": "m", "task": None}, ["body", "task"]),
        ({"model": "m", "gpu_ids": [0.5]}, ["body", "gpu_ids", 0]),
        ({"model": "m", "gpu_ids": "s3cret"}, ["body", "gpu_ids"]),
        ({"model": "m", "gpu_share": 2}, ["body", "gpu_share"]),
        ({"model": "m", "extra_kwargs": None}, ["body", "extra_kwargs"]),
        ({"model": "m", "extra_kwargs": ["s3cret"]}, ["body", "extra_kwargs"]),
        ({"model": "m", "extra_kwargs": {"dtype": "s3cret\0"}}, ["body", "extra_kwargs"]),
        ({"model": "m", "extra_kwargs": {"chat_template": "s3cret" * 20_000}}, ["body", "extra_kwargs"]),
    ],
)
def test_bodies_that_can_never_work(shared: Daemon, body: dict[str, Any], place: list[str | int]) -> None:
    reply = shared.http.post("/launch", json=body)
    assert problems(reply)[0]["loc"] == place
    assert "s3cret" not in reply.text
    assert shared.http.get("/launch").json() == []


def test_what_is_read_with_indulgence(shared: Daemon) -> None:
    assert launch(shared, gpu_ids=["1", 0, 1], colour="red")["gpu_ids"] == [0, 1]


def test_unknown_launches(shared: Daemon) -> None:
    for method, path in (
        ("GET", "/status/no"),
        ("GET", "/logs/no"),
        ("GET", "/logs/no?offset=5"),
        ("POST", "/stop/no"),
    ):
        reply = shared.http.request(method, path)
        assert (reply.status_code, reply.json()) == (404, {"detail": "Unknown launch_id: no"})
    for offset in ("-1", "x", "1.5"):
        assert problems(shared.http.get(f"/logs/no?offset={offset}"))[0]["loc"] == ["query", "offset"]


@pytest.mark.parametrize(("method", "path"), [("HEAD", "/launch"), ("DELETE", "/launch"), ("GET", "/stop/x")])
def test_other_methods(shared: Daemon, method: str, path: str) -> None:
    assert raw(shared, method, path)[0] == 405


# -- GPUs ----------------------------------------------------------------------------------------------------------


def test_gpus_that_others_have(shared: Daemon) -> None:
    first = launch(shared, gpu_ids=[0])["launch_id"]
    shared.create(instance_id="other", gpu_uuids=["GPU-1"])
    for body in ({}, {"gpu_ids": [0, 1]}):
        reply = shared.http.post("/launch", json={"model": "m", **body})
        assert reply.status_code == 409
        assert reply.json()["detail"] == f"Requested GPUs are in use (gpu 0 -> {first}, gpu 1 -> other)"
    stop(shared, first)
    assert launch(shared, gpu_ids=[0])["gpu_ids"] == [0]


def test_many_launches_at_once_on_one_gpu(shared: Daemon) -> None:
    body = {"model": "m", "gpu_ids": [0]}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: httpx.post(f"{shared.url}/launch", json=body, timeout=30), range(8)))
    assert sorted(reply.status_code for reply in replies) == [201, *[409] * 7], [reply.text for reply in replies]


def test_gpus_of_bullpens_choice_and_shares(shared: Daemon) -> None:
    first = launch(shared, gpu_count=1)["gpu_ids"]
    second = launch(shared, gpu_count=1, gpu_share=0.5)["gpu_ids"]
    assert first != second
    assert launch(shared, gpu_ids=second, gpu_share=0.5)["gpu_ids"] == second
    assert shared.http.post("/launch", json={"model": "m", "gpu_ids": second, "gpu_share": 0.1}).status_code == 409
    assert shared.http.post("/launch", json={"model": "m", "gpu_count": 1}).status_code == 409


# -- stop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({"BULLPEN_SIM_STUBBORN": "2"}, "ready"),
        ({"BULLPEN_SIM_START_SECONDS": "60"}, "bootstrapping"),
        ({"BULLPEN_SIM_START_SECONDS": "60", "BULLPEN_SIM_STUBBORN": "2"}, "bootstrapping"),
    ],
)
def test_stop_is_in_time_whatever_it_does(
    start_daemon: Callable[..., Daemon], variables: dict[str, str], first: str
) -> None:
    daemon = start_daemon(environment=variables, stop_timeout=60, mock_gpus=True, mock_gpu_count=1).wait_warm()
    name = launch(daemon)["launch_id"]
    wait_until(lambda: status(daemon, name)["pid"] is not None)
    begun = reach(daemon, name, first)
    stopped = stop(daemon, name)
    assert (stopped["state"], stopped["error"]) == ("stopped", None)
    assert not is_alive(begun["pid"])
    launch(daemon)
    daemon.http.delete(INSTANCES)


def test_stop_right_after_the_launch(shared: Daemon) -> None:
    for _ in range(5):
        name = launch(shared)["launch_id"]
        assert stop(shared, name)["state"] == "stopped"
    assert shared.http.get("/launch").json() == []


def test_many_stops_at_once(shared: Daemon) -> None:
    name = launch(shared)["launch_id"]
    reach(shared, name)
    with ThreadPoolExecutor(4) as pool:
        assert {one["state"] for one in pool.map(lambda _: stop(shared, name), range(4))} == {"stopped"}


def test_older_launches_are_forgotten(shared: Daemon) -> None:
    names = []
    for _ in range(KEPT + 2):
        names.append(launch(shared, gpu_ids=[0], extra_kwargs={"port": "abc"})["launch_id"])
        reach(shared, names[-1], "failed")
    stop(shared, names[-1])
    wait_until(lambda: shared.http.get(f"/status/{names[1]}").status_code == 404)
    assert shared.http.get(f"/logs/{names[0]}").status_code == 404
    assert len(shared.http.get(INSTANCES).json()["instances"]) == KEPT
    assert status(shared, names[2])["state"] == "failed"


# -- logs ----------------------------------------------------------------------------------------------------------


def test_log_in_pieces(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(environment={"BULLPEN_SIM_LOG_BYTES": "2500000"}).wait_warm()
    name = launch(daemon, "org/m\u00f6del-\u20ac")["launch_id"]
    reach(daemon, name)
    stop(daemon, name)
    first = daemon.http.get(f"/logs/{name}").json()
    assert first["offset"] == 0
    assert len(first["content"].encode()) == first["next_offset"] <= 1 << 20
    whole = log_of(daemon, name)
    size = len(whole.encode())
    assert size > 2_500_000
    assert "m\u00f6del-\u20ac" in whole and "\ufffd" not in whole
    for beyond in (size, size + 1, 10**30):
        piece = daemon.http.get(f"/logs/{name}", params={"offset": beyond}).json()
        assert (piece["offset"], piece["next_offset"], piece["content"]) == (size, size, "")


@pytest.mark.parametrize("size", [10, launches.LARGE_PIECE])
async def test_a_large_piece_of_log_is_made_text_beside_everything_else(size: int) -> None:
    """It takes milliseconds, which callers of other launches would wait for."""
    threads: list[threading.Thread] = []

    class Noted(Piece):
        @property
        def content(self) -> str:
            threads.append(threading.current_thread())
            return super().content

    reader = SimpleNamespace(read_log=lambda launch_id, offset: Noted(offset, b"x" * size))
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(launches=reader)))
    reply = await launches.logs(cast(Any, request), "a", 3)
    assert json.loads(bytes(reply.body)) == {
        "launch_id": "a",
        "offset": 3,
        "next_offset": 3 + size,
        "content": "x" * size,
    }
    assert [thread is threading.main_thread() for thread in threads] == [size < launches.LARGE_PIECE]


# -- the daemon ----------------------------------------------------------------------------------------------------


def test_launches_outlive_a_crash_of_the_daemon(
    start_daemon: Callable[..., Daemon], outliving: Callable[[int], psutil.Process]
) -> None:
    settings: dict[str, Any] = {"mock_gpus": True, "mock_gpu_count": 2}
    first = start_daemon(**settings).wait_warm()
    ended = launch(first, "org/ended", gpu_ids=[0])["launch_id"]
    reach(first, ended)
    stopped = stop(first, ended)
    alive = launch(first, "org/alive", task="embed", gpu_ids=[1])["launch_id"]
    ready = reach(first, alive)
    outliving(ready["pid"])
    first.kill()

    second = start_daemon(first.state_dir, **settings)
    assert status(second, ended) == stopped
    assert log_of(second, ended)
    assert reach(second, alive) == ready
    assert "gpu 1 -> " + alive in second.http.post("/launch", json={"model": "m"}).json()["detail"]
    assert stop(second, alive)["state"] == "stopped"


def test_access(start_daemon: Callable[..., Daemon]) -> None:
    key = "the:k\u00e9y"
    daemon = start_daemon(access_key=key)
    basic = base64.b64encode(f"anybody:{key}".encode()).decode()
    ways = {"Authorization": [f"bearer {key}", f"Basic {basic}"], "X-API-Key": [key]}
    for header, values in ways.items():
        for value in values:
            assert raw(daemon, "GET", "/launch", headers={header: value.encode().decode("latin-1")})[0] == 200, value
    paths = [("GET", "/launch"), ("GET", "/status/x"), ("GET", "/logs/x"), ("GET", "/stats"), ("GET", "/nowhere")]
    for method, path in [*paths, ("POST", "/launch"), ("POST", "/stop/x"), ("GET", "/")]:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key[:3]}, {"X-API-Key": "wrong"}):
            reply = daemon.http.request(method, path, headers=headers)
            assert reply.status_code == 401, (method, path, headers)
            assert reply.headers["www-authenticate"].startswith("Basic ")
    assert daemon.http.get("/health").status_code == 200
    assert daemon.http.get("/ready").status_code in (200, 503)


def test_document_has_the_launches(shared: Daemon) -> None:
    document = shared.http.get("/openapi.json").json()
    groups = {
        "/launch": {"get", "post"},
        "/status/{launch_id}": {"get"},
        "/logs/{launch_id}": {"get"},
        "/stop/{launch_id}": {"post"},
        "/stats": {"get"},
    }
    assert {path: set(document["paths"][path]) for path in groups} == groups
    assert {"201", "400", "409", "422", "500"} <= set(document["paths"]["/launch"]["post"]["responses"])
    for name, example in (
        ("Launch", launch_models.EXAMPLE_LAUNCH),
        ("LaunchLog", launch_models.EXAMPLE_LOG),
        ("Stats", launch_models.EXAMPLE_STATS),
    ):
        getattr(launch_models, name).model_validate(example, extra="forbid")
        assert set(example) == set(document["components"]["schemas"][name]["properties"])
    assert shared.http.post("/launch", json=launch_models.EXAMPLE_LAUNCH_REQUEST).json()["gpu_ids"] == [0]
