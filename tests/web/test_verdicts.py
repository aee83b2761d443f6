"""Verdicts over HTTP: what somebody found out about a level of sleep is remembered, and the ladder goes by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES, problems

WHY = "the 3rd token differs"
WRONG: dict[str, Any] = {"level": 1, "works": False, "why": WHY}


def judge(daemon: Daemon, instance_id: str, **body: Any) -> httpx.Response:
    headers = {"Content-Type": "application/json"}  # httpx's own JSON cannot say what is no valid Unicode
    return daemon.http.post(f"{INSTANCES}/{instance_id}/verdicts", content=json.dumps(body), headers=headers)


def ready(daemon: Daemon, instance_id: str, **fields: Any) -> None:
    daemon.create(instance_id=instance_id, **fields)
    daemon.wait_state(instance_id, "ready")


def explain(daemon: Daemon, instance_id: str) -> dict[str, Any]:
    return dict(daemon.http.get(f"{INSTANCES}/{instance_id}/explain").json())


def test_verdict_is_remembered_and_the_ladder_skips_the_level(shared: Daemon) -> None:
    ready(shared, "a", options="--model org/judged", gpus=1, sleep_after="1h")
    assert explain(shared, "a")["next_step"]["to"] == "level_1"
    reply = judge(shared, "a", **WRONG)
    assert reply.status_code == 200, reply.text
    works = reply.json()["level_1"]
    assert (works["works"], works["why"], reply.json()["level_2"]) == (False, WHY, None)
    told = explain(shared, "a")
    assert told["works"] == reply.json()
    assert told["next_step"]["to"] == "level_2"
    assert judge(shared, "a", level=1, works=True, why="tried again").json()["level_1"]["works"] is True
    assert explain(shared, "a")["next_step"]["to"] == "level_1"


def test_next_daemon_remembers_it(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    model: dict[str, Any] = {"options": "--model org/judged", "gpus": 1}
    for _ in range(2):
        daemon = start_daemon(tmp_path / "state", mock_gpus=True, mock_gpu_count=1).wait_warm()
        ready(daemon, "a", **model)
        found = explain(daemon, "a")["works"]
        if found["level_2"] is None:
            assert judge(daemon, "a", level=2, works=False, why=WHY).status_code == 200
        daemon.end()
    assert (found["level_1"], found["level_2"]["works"], found["level_2"]["why"]) == (None, False, WHY)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({**WRONG, "level": 0}, "level"),
        ({**WRONG, "level": 3}, "level"),
        ({**WRONG, "level": "1"}, "level"),
        ({**WRONG, "level": True}, "level"),
        ({**WRONG, "level": 1.5}, "level"),
        ({**WRONG, "works": "false"}, "works"),
        ({**WRONG, "works": 0}, "works"),
        ({**WRONG, "works": None}, "works"),
        ({**WRONG, "why": ""}, "why"),
        ({**WRONG, "why": "two\nlines"}, "why"),
        ({**WRONG, "why": "at the end\n"}, "why"),
        ({**WRONG, "why": "\x1b[31m"}, "why"),
        ({**WRONG, "why": "\ud800"}, "why"),
        ({**WRONG, "why": "x" * 501}, "why"),
        ({**WRONG, "why": 1}, "why"),
        ({**WRONG, "depth": 1}, "depth"),
        ({"works": False, "why": WHY}, "level"),
        ({"level": 1, "why": WHY}, "works"),
        ({"level": 1, "works": False}, "why"),
    ],
)
def test_bad_verdict_is_refused_with_its_place(shared: Daemon, body: dict[str, Any], field: str) -> None:
    ready(shared, "a", options="--model org/unjudged", gpus=1)
    (problem,) = problems(judge(shared, "a", **body))
    assert problem["loc"][-1] == field
    assert explain(shared, "a")["works"] == {"level_1": None, "level_2": None}


@pytest.mark.parametrize("fields", [{"gpus": 1, "sleep": "off"}, {"gpus": 1, "sleep": "emulate"}, {}])
def test_instance_without_that_sleep(shared: Daemon, fields: dict[str, Any]) -> None:
    ready(shared, "a", options="--model org/unjudged", **fields)
    reply = judge(shared, "a", **WRONG)
    assert reply.status_code == 409
    assert "'a' cannot sleep at level 1" in reply.json()["detail"]


def test_nobody_of_that_id(shared: Daemon) -> None:
    reply = judge(shared, "nobody", **WRONG)
    assert reply.status_code == 404 and "'nobody'" in reply.json()["detail"]
