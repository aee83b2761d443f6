"""An instance as the wire shows it, from its first moment to its last."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime

import pytest

from bullpen.core.instance import State
from bullpen.core.public import public, timestamp
from bullpen.core.request import read_config
from tests.core.scenario import Scenario

BARE = {"env_vars", "gpu_uuids", "annotations"}


def test_only_what_was_given_comes_back() -> None:
    document = public(Scenario().reach(State.READY))
    assert not BARE & set(document)
    assert document["options"] == "--model m"
    config = read_config("m", env_vars={"A": 1}, gpu_uuids=["GPU-0"], annotations={"k": "v"}, engine="sim")
    document = public(replace(Scenario().reach(State.READY), config=config))
    assert [document[name] for name in sorted(BARE)] == [{"k": "v"}, {"A": "1"}, ["GPU-0"]]


def test_secrets_do_not() -> None:
    config = read_config(
        "--model m --api-key s3cr3t-1 --hf-token=s3cr3t-2", env_vars={"HF_TOKEN": "s3cr3t-3"}, engine="sim"
    )
    document = public(replace(Scenario().reach(State.READY), config=config))
    assert "s3cr3t" not in json.dumps(document)
    assert document["options"] == "--model m --api-key *** --hf-token=***"
    assert document["env_vars"] == {"HF_TOKEN": "***"}


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.STARTING, "running"),
        (State.READY, "running"),
        (State.STOPPING, "running"),
        (State.STOPPED, "stopped"),
        (State.FAILED, "stopped"),
    ],
)
def test_status_is_coarse_and_state_is_fine(state: State, status: str) -> None:
    document = public(Scenario().reach(state))
    assert (document["status"], document["state"]) == (status, str(state))
    assert public(Scenario().reach(state), "terminated")["status"] == "terminated"


def test_what_cannot_be_stopped_runs() -> None:
    document = public(Scenario().stick())
    assert (document["status"], document["state"], document["error"]["class"]) == ("running", "failed", "stuck")
    assert "exit_code" not in document


def test_phase_and_progress_while_it_starts() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    assert (public(instance)["phase"], public(instance)["progress"]) == ("start", 0.0)
    scene.phase("weights", 0.45678)
    assert (public(instance)["phase"], public(instance)["progress"]) == ("weights", 0.457)
    scene.answered()
    document = public(instance)
    assert not {"phase", "progress", "exit_code", "error", "ended_at"} & set(document)
    assert document["phases"] == {"start": 0.0, "weights": 1.0, "ready": 2.0}
    assert document["url"] == "http://127.0.0.1:20001"


def test_end_says_how_and_why() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY)
    scene.exited(-9)
    document = public(instance)
    assert document["exit_code"] == -9
    assert document["error"] == {"class": "error", "message": "it fell over"}
    assert document["ended_at"] == timestamp(scene.now)


def test_before_it_is_a_server_there_is_little_to_say() -> None:
    scene = Scenario()
    scene.create()
    document = public(scene.instance())
    assert (document["model"], document["served_model_names"], document["url"], document["pid"]) == (
        None,
        [],
        None,
        None,
    )


def test_times_are_rfc_3339_in_utc() -> None:
    assert timestamp(None) is None
    text = timestamp(1_700_000_000.1234)
    assert text == "2023-11-14T22:13:20.123+00:00"
    assert datetime.fromisoformat(text).timestamp() == pytest.approx(1_700_000_000.123)
