"""The body of POST and PUT: every field, what it takes, what it refuses, and that a refusal echoes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from bullpen.web.body import MOST_BYTES, TOO_LONG
from tests.support.daemon import Daemon, wait_until
from tests.web.calls import INSTANCES, problems, raw

NEEDLE = "s3cr3t-needle"


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on a host without GPUs, whose operator allows two variables that change how programs load."""
    state_dir = tmp_path_factory.mktemp("lenient") / "state"
    with Daemon(state_dir, allow_env="LD_LIBRARY_PATH,PYTHONPATH", mock_gpus=True, mock_gpu_count=0) as daemon:
        yield daemon.wait_ready().wait_warm()


def refused(daemon: Daemon, **fields: Any) -> list[dict[str, Any]]:
    """What a body is refused with; whatever it holds as a value does not come back."""
    content = json.dumps({"options": "--model m", **fields})
    reply = daemon.http.post(INSTANCES, content=content, headers={"Content-Type": "application/json"})
    found = problems(reply)
    assert NEEDLE not in reply.text
    assert daemon.http.get(INSTANCES).json()["total_instances"] == 0
    return found


def test_reply_has_the_fields_as_given(shared: Daemon) -> None:
    given: dict[str, Any] = {
        "options": "--model  m   --max-model-len 2k",
        "env_vars": {"SOME_NAME": "some value", "EMPTY": ""},
        "gpu_uuids": ["GPU-1"],
        "annotations": {"team/unit": "sëarch", "": ""},
    }
    created = shared.create(instance_id="whole", **given)
    assert created["status"] == "started"
    for document in (created, shared.instance("whole")):
        assert {name: document[name] for name in given} == given
    assert shared.delete("whole")["annotations"] == given["annotations"]


def test_fields_left_out_or_null_do_not_come_back(shared: Daemon) -> None:
    null: dict[str, Any] = {"env_vars": None, "gpu_uuids": None, "annotations": None}
    assert not set(null) & set(shared.create())
    assert not set(null) & set(shared.create(**null))


def test_empty_fields_come_back_empty(shared: Daemon) -> None:
    created = shared.create(env_vars={}, gpu_uuids=[], annotations={})
    assert (created["env_vars"], created["gpu_uuids"], created["annotations"]) == ({}, [], {})


def test_numbers_and_booleans_are_taken_as_json(shared: Daemon) -> None:
    values = {"WHOLE": 5, "PART": 0.25, "BIG": 10**30, "NEGATIVE": -1, "YES": True, "NO": False, "TEXT": "5"}
    created = shared.create(env_vars=values)
    assert created["env_vars"] == {
        "WHOLE": "5",
        "PART": "0.25",
        "BIG": "1" + "0" * 30,
        "NEGATIVE": "-1",
        "YES": "true",
        "NO": "false",
        "TEXT": "5",
    }


def test_number_reaches_the_server(shared: Daemon) -> None:
    created = shared.create(env_vars={"BULLPEN_SIM_EXIT_AFTER": 0.05, "BULLPEN_SIM_EXIT_CODE": 7})
    assert shared.wait_state(created["instance_id"], "failed")["exit_code"] == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", NEEDLE),
        ("A=B", NEEDLE),
        ("=", NEEDLE),
        ("A\0B", NEEDLE),
        ("A", NEEDLE + "\0"),
        ("A", None),
        ("A", [NEEDLE]),
        ("A", {NEEDLE: NEEDLE}),
        ("LD_PRELOAD", NEEDLE),
        ("LD_LIBRARY_PATH", NEEDLE),
        ("LD_AUDIT", NEEDLE),
        ("PYTHONPATH", NEEDLE),
        ("PYTHONSTARTUP", NEEDLE),
        ("PATH", NEEDLE),
    ],
)
def test_bad_variable(shared: Daemon, name: str, value: Any) -> None:
    found = refused(shared, env_vars={name: value})
    assert all(problem["loc"][:2] == ["body", "env_vars"] for problem in found)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_number_that_is_none_in_json(shared: Daemon, number: str) -> None:
    status, body = raw(shared, "POST", INSTANCES, f'{{"options": "--model m", "env_vars": {{"A": {number}}}}}'.encode())
    assert status == 422, body
    assert json.loads(body)["detail"][0]["loc"][:2] == ["body", "env_vars"]


def test_variable_that_changes_how_programs_load_is_named_with_the_way_out(shared: Daemon) -> None:
    (problem,) = refused(shared, env_vars={"LD_PRELOAD": "/lib/x.so"})
    assert "--allow-env LD_PRELOAD" in problem["msg"]


def test_variable_that_the_operator_allows(lenient: Daemon) -> None:
    created = lenient.create(env_vars={"LD_LIBRARY_PATH": "/nowhere"})
    lenient.wait_state(created["instance_id"], "ready")
    lenient.delete(created["instance_id"])
    for name in ("LD_PRELOAD", "PYTHONHOME", "LD_LIBRARY_PATH_32"):
        refused(lenient, env_vars={name: "/nowhere"})


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"options": None}, ["body", "options"]),
        ({"options": 5}, ["body", "options"]),
        ({"options": ["--model", NEEDLE]}, ["body", "options"]),
        ({"options": f"--model m\0{NEEDLE}"}, ["body", "options"]),
        ({"env_vars": [NEEDLE]}, ["body", "env_vars"]),
        ({"env_vars": NEEDLE}, ["body", "env_vars"]),
        ({"gpu_uuids": NEEDLE}, ["body", "gpu_uuids"]),
        ({"gpu_uuids": [5]}, ["body", "gpu_uuids", 0]),
        ({"gpu_uuids": {NEEDLE: 1}}, ["body", "gpu_uuids"]),
        ({"annotations": {"a": 1}}, ["body", "annotations", "a"]),
        ({"annotations": [NEEDLE]}, ["body", "annotations"]),
        ({"engine": NEEDLE}, ["body", "engine"]),
    ],
)
def test_wrong_type(shared: Daemon, fields: dict[str, Any], place: list[Any]) -> None:
    assert refused(shared, **fields)[0]["loc"] == place


def test_options_are_required(shared: Daemon) -> None:
    (problem,) = problems(shared.http.post(INSTANCES, json={"env_vars": {}}))
    assert problem["loc"] == ["body", "options"]
    assert problem["type"] == "missing"


def test_unknown_fields_are_named(shared: Daemon) -> None:
    found = refused(shared, option=NEEDLE, envs={"A": NEEDLE})
    assert [problem["loc"] for problem in found] == [["body", "option"], ["body", "envs"]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"options": "--model s3cr3t-needle"',
        b'"s3cr3t-needle"',
        b"[]",
        b"null",
        b"s3cr3t-needle",
        b'{"options": "--model m \xff s3cr3t-needle"}',
        b"[" * 200_000,
        b'{"options": "--model m", "env_vars": {"A": ' + b"9" * 5000 + b"}}",
    ],
    ids=["empty", "open", "cut", "text", "list", "null", "word", "no UTF-8", "deep", "long number"],
)
def test_no_json_object(shared: Daemon, body: bytes) -> None:
    status, reply = raw(shared, "POST", INSTANCES, body)
    assert status == 422, reply
    assert b"s3cr3t" not in reply
    assert all(set(problem) == {"type", "loc", "msg"} for problem in json.loads(reply)["detail"])


@pytest.mark.parametrize(
    "fields",
    [
        {"options": "--model m \ud800"},
        {"env_vars": {"A": "\udfff"}},
        {"env_vars": {"A\ud800": "x"}},
        {"annotations": {"a": "\ud800"}},
        {"annotations": {"\ud800": "a"}},
        {"gpu_uuids": ["\ud800"]},
        {"engine": "\ud800"},
        {"\ud800": 1},
        {"\udcff unknown": {"\ud800": "\ud800"}},
    ],
)
def test_text_that_is_no_valid_unicode(shared: Daemon, fields: dict[str, Any]) -> None:
    refused(shared, **fields)


def test_without_a_content_type(shared: Daemon) -> None:
    reply = shared.http.post(INSTANCES, content=b'{"options": "--model m"}')
    assert reply.status_code == 422


def test_gpu_that_is_not_there(shared: Daemon) -> None:
    (problem,) = refused(shared, gpu_uuids=["GPU-0", "GPU-7"])
    assert problem["loc"] == ["body", "gpu_uuids"]
    assert "'GPU-7'" in problem["msg"]
    assert "GPU-0 (index 0), GPU-1 (index 1)" in problem["msg"]


def test_gpu_named_twice(shared: Daemon) -> None:
    refused(shared, gpu_uuids=["GPU-0", "GPU-0"])


def test_gpu_on_a_host_without_any(lenient: Daemon) -> None:
    (problem,) = refused(lenient, gpu_uuids=["GPU-0"])
    assert "none" in problem["msg"]


def test_gpu_of_another_instance(shared: Daemon) -> None:
    shared.create(instance_id="first", gpu_uuids=["GPU-0"])
    body = {"options": "--model m", "gpu_uuids": ["GPU-1", "GPU-0"]}
    reply = shared.http.post(INSTANCES, json=body)
    assert reply.status_code == 409
    assert "GPU-0" in reply.json()["detail"]
    assert "'first'" in reply.json()["detail"]
    shared.create(gpu_uuids=["GPU-1"])
    shared.delete("first")
    shared.create(gpu_uuids=["GPU-0"])


def test_gpu_of_an_instance_that_ended_is_free(shared: Daemon) -> None:
    shared.create(instance_id="first", gpu_uuids=["GPU-0"], env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.05"})
    shared.wait_state("first", "failed")
    body = {"options": "--model m", "gpu_uuids": ["GPU-0"]}
    # Free as soon as the last process of its tree is gone, which may be a moment later.
    wait_until(lambda: shared.http.post(INSTANCES, json=body).status_code == 201)


def test_no_gpu_named_claims_none(shared: Daemon) -> None:
    for _ in range(3):
        shared.create()
    shared.create(gpu_uuids=["GPU-0", "GPU-1"])


# -- its length --------------------------------------------------------------------------------------------------------


def chunks(count: int) -> Iterator[bytes]:
    """A body whose length is not said beforehand, in pieces of 1 MiB."""
    yield b'{"options": "'
    for _ in range(count):
        yield b"x" * (1 << 20)
    yield b'"}'


@pytest.mark.parametrize("path", [INSTANCES, "/launch", "/v1/vllm"])
def test_body_that_is_too_long(shared: Daemon, path: str) -> None:
    """It is refused, whether its length is said or seen, and not kept."""
    before = psutil.Process(shared.pid).memory_info().rss
    said = {"Content-Length": str(MOST_BYTES + 1)}  # none of it needs to be sent
    seen = shared.http.post(path, content=chunks(80), headers={"Content-Type": "application/json"})
    for status, reply in (raw(shared, "POST", path, headers=said), (seen.status_code, seen.content)):
        assert (status, json.loads(reply)) == (413, {"detail": TOO_LONG})
    assert psutil.Process(shared.pid).memory_info().rss - before < 3 * MOST_BYTES
    assert shared.http.get(INSTANCES).json()["total_instances"] == 0


def test_body_of_just_the_right_length(shared: Daemon) -> None:
    """It is read, and refused for what it says."""
    (problem,) = problems(
        shared.http.post(INSTANCES, content=b" " * MOST_BYTES, headers={"Content-Type": "application/json"})
    )
    assert problem["loc"][0] == "body"
