"""Options: split as a shell does, refused before anything is forked, and the port that they name."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.daemon import Daemon, wait_until
from tests.web.calls import INSTANCES, problems, unused_port


def given_arguments(daemon: Daemon, instance_id: str) -> str:
    """The line in which the server says what it was given."""
    daemon.wait_state(instance_id, "ready")
    return next(line for line in daemon.log(instance_id).splitlines() if "non-default args" in line)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--model m --port 8999999", "8999999 is no port number"),
        ("--model m --port -1", "-1 is no port number"),
        ("--model m --port eight", "invalid int value: 'eight'"),
        ("--model m --port", "--port: expected one value"),
        ("", "no model"),
        ("   ", "no model"),
        ("--port 8000", "no model"),
        ("--model", "--model: expected one value"),
        ("--model ''", "no model"),
        ("m second-model", "unrecognized arguments"),
        ("--model m --help", "--help starts no server"),
        ("--model m --max-model-len many", "--max-model-len"),
        ("--model m --hf-overrides '{\"a\": }'", "--hf-overrides: the value is not valid JSON"),
        ('--model m --hf-overrides {"a": 1}', "--hf-overrides: the value is not valid JSON"),
        ("--model 'm", "no closing quotation"),
        ('--model m "', "no closing quotation"),
        ("--model m \\", "no escaped character"),
    ],
)
def test_refused(shared: Daemon, options: str, expected: str) -> None:
    (problem,) = problems(shared.http.post(INSTANCES, json={"options": options}))
    assert problem["loc"] == ["body", "options"]
    assert expected in problem["msg"]
    assert shared.http.get(INSTANCES).json()["total_instances"] == 0


def test_refusal_leaves_nothing(shared: Daemon) -> None:
    shared.create(instance_id="good")
    before = shared.http.get(INSTANCES).json()["revision"]
    for _ in range(5):
        problems(shared.http.put(f"{INSTANCES}/bad", json={"options": "--model m --port eight"}))
    listed = shared.http.get(INSTANCES).json()
    assert listed["revision"] == before, "nobody has seen anything of it"
    assert shared.create(instance_id="bad")["status"] == "started", "the id is free"


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ("--model m", "m"),
        ("m", "m"),
        ("--model=m", "m"),
        ("'my model'", "my model"),
        ('--model "org/a model" --enforce-eager', "org/a model"),
        ("--model m # not a comment", None),
        ("--model m\n  --enforce-eager\n", "m"),
        ("--enforce-eager m", "m"),
        ("--model caf\u00e9", "caf\u00e9"),
    ],
)
def test_split_as_a_shell_does(shared: Daemon, options: str, model: str | None) -> None:
    reply = shared.http.post(INSTANCES, json={"options": options})
    if model is None:
        problems(reply)
    else:
        assert reply.json()["model"] == model
        assert reply.json()["served_model_names"] == [model]
        assert reply.json()["options"] == options


def test_quoted_json_reaches_the_server_whole(shared: Daemon) -> None:
    overrides = {"rope_scaling": {"type": "a b", "factor": 2.0}, "quote": "it's"}
    escaped = json.dumps(overrides).replace("'", "'\"'\"'")
    shared.create(f"--model m --hf-overrides '{escaped}'", instance_id="quoted")
    assert repr(json.dumps(overrides)) in given_arguments(shared, "quoted")


def test_served_names_are_told(shared: Daemon) -> None:
    created = shared.create("--model m --served-model-name one two")
    assert created["model"] == "m"
    assert created["served_model_names"] == ["one", "two"]


def test_no_port_picks_one_and_says_so(shared: Daemon) -> None:
    urls = set()
    for number in range(3):
        created = shared.create(f"--model m{number}{' --port 0' if number == 2 else ''}")
        shared.wait_state(created["instance_id"], "ready")
        urls.add(created["url"])
        models = httpx.get(f"{created['url']}/v1/models").json()
        assert models["data"][0]["id"] == f"m{number}"
    assert len(urls) == 3


def test_port_that_was_named(shared: Daemon) -> None:
    port = unused_port()
    created = shared.create(f"--model m --port {port}")
    assert created["url"] == f"http://127.0.0.1:{port}"
    shared.wait_state(created["instance_id"], "ready")
    assert httpx.get(f"{created['url']}/health").status_code == 200
    shared.delete(created["instance_id"])
    assert shared.create(f"--model m --port {port}")["url"] == created["url"], "the port is free again"


def test_port_of_another_instance(shared: Daemon) -> None:
    port = unused_port()
    shared.create(f"--model m --port {port}", instance_id="first")
    for state in ("starting", "ready"):
        if state == "ready":
            shared.wait_state("first", "ready")
        reply = shared.http.put(f"{INSTANCES}/second", json={"options": f"--model m --port={port}"})
        assert reply.status_code == 409
        assert str(port) in reply.json()["detail"]
        assert "'first'" in reply.json()["detail"]
    assert shared.http.get(f"{INSTANCES}/second").status_code == 404


def test_port_of_an_instance_that_ended_is_free(shared: Daemon) -> None:
    port = unused_port()
    shared.create(f"--model m --port {port}", instance_id="first", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.05"})
    shared.wait_state("first", "failed")
    body = {"options": f"--model m --port {port}"}
    # Free as soon as the last process of its tree is gone, which may be a moment later.
    wait_until(lambda: shared.http.put(f"{INSTANCES}/second", json=body).status_code == 201)
    shared.wait_state("second", "ready")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_port_of_another_program(shared: Daemon, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, dualstack_ipv6=address == "::") as listener:
        port = listener.getsockname()[1]
        reply = shared.http.post(INSTANCES, json={"options": f"--model m --port {port}"})
        assert reply.status_code == 409
        assert str(port) in reply.json()["detail"]
        assert "another program" in reply.json()["detail"]


def test_port_of_the_daemon_itself(shared: Daemon) -> None:
    port = urlsplit(shared.url).port
    assert shared.http.post(INSTANCES, json={"options": f"--model m --port {port}"}).status_code == 409


@pytest.mark.parametrize("host", ["203.0.113.77", "not a host"])
def test_host_that_is_not_this_one(shared: Daemon, host: str) -> None:
    (problem,) = problems(shared.http.post(INSTANCES, json={"options": f"--model m --host '{host}' --port 45678"}))
    assert problem["loc"] == ["body", "options"]
    assert "--host" in problem["msg"]


def test_host_that_was_named(shared: Daemon) -> None:
    created = shared.create("--model m --host 127.0.0.2")
    assert created["url"].startswith("http://127.0.0.2:")
    shared.wait_state(created["instance_id"], "ready")


def test_options_longer_than_any_command_line(shared: Daemon) -> None:
    (problem,) = problems(shared.http.post(INSTANCES, json={"options": "--model m --chat-template " + "x" * 300_000}))
    assert "too long" in problem["msg"]


def test_longest_that_fits(shared: Daemon) -> None:
    value = "\N{SNOWMAN}" * 10_000  # six bytes each as JSON
    shared.create("--model m", instance_id="long", env_vars={"A": value})
    assert shared.wait_state("long", "ready")["env_vars"] == {"A": value}


def test_environment_longer_than_any(shared: Daemon) -> None:
    reply = shared.http.post(INSTANCES, json={"options": "--model m", "env_vars": {"A": "x" * 300_000}})
    assert problems(reply)[0]["loc"] == ["body", "env_vars"]


def test_no_process_is_left_of_what_was_refused(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(spares=0).wait_warm()
    zygote = daemon.http.get("/ready").json()["zygotes"][0]["pid"]
    port = unused_port()
    daemon.create(f"--model m --port {port}", instance_id="first")
    expected = {daemon.instance("first")["pid"]}
    for options in ("--port 1", "--model m --port eight", f"--model m --port {port}"):
        assert daemon.http.post(INSTANCES, json={"options": options}).status_code in (409, 422)
    wait_until(lambda: {child.pid for child in psutil.Process(zygote).children()} == expected)
