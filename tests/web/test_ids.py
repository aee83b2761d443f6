"""Ids: which may be, which may not, and that none becomes a path."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES, raw

BODY = json.dumps({"options": "--model m"}).encode()


def known_ids(daemon: Daemon) -> list[str]:
    return list(daemon.http.get(INSTANCES, params={"detail": False}).json()["instance_ids"])


@pytest.mark.parametrize(
    "instance_id", ["a", "0", "-", "_x", "A-Z_0.9", "a..b", "abc123...", "WATCH", "watch2", "log", "default", "a" * 128]
)
def test_good(shared: Daemon, instance_id: str) -> None:
    assert shared.create(instance_id=instance_id)["instance_id"] == instance_id
    assert shared.instance(instance_id)["status"] == "running"
    assert shared.delete(instance_id)["status"] == "terminated"


@pytest.mark.parametrize(
    "path",
    [
        "watch",
        ".",
        "..",
        ".hidden",
        "%2e%2e",
        "a" * 129,
        "a" * 5000,
        "%C3%A9",  # é
        "%EF%BC%A1",  # a full-width A
        "%D9%A1",  # an Arabic one
        "%ff",
        "a%20b",
        "a%0A",
        "a%00b",
        "a%25b",
        "a:b",
        "a~b",
        "a+b",
        "%F0%9F%98%80",
    ],
)
def test_bad(shared: Daemon, path: str) -> None:
    status, body = raw(shared, "PUT", f"{INSTANCES}/{path}", BODY)
    assert status == 422, body
    (problem,) = json.loads(body)["detail"]
    assert problem["loc"] == ["path", "instance_id"]
    assert "128" in problem["msg"]
    assert known_ids(shared) == []


@pytest.mark.parametrize(
    "path", ["a/b", "a%2Fb", "a%2fb", "a/", "a%2F", "../instances/a", "..%2F..%2Fa", "%2Fetc%2Fpasswd"]
)
def test_slash_leads_to_no_route(shared: Daemon, path: str) -> None:
    status, body = raw(shared, "PUT", f"{INSTANCES}/{path}", BODY)
    assert status == 404, body
    assert known_ids(shared) == []


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("path", ["none", ".hidden", "..", "a" * 129, "%C3%A9", "a%2Fb", "%00"])
def test_unknown(shared: Daemon, method: str, path: str) -> None:
    status, body = raw(shared, method, f"{INSTANCES}/{path}")
    assert status == 404, body
    assert isinstance(json.loads(body)["detail"], str)


def test_log_of_unknown(shared: Daemon) -> None:
    for path in ("none", "watch", "..", "%2e%2e"):
        assert raw(shared, "GET", f"{INSTANCES}/{path}/log")[0] == 404


def test_chosen_by_the_daemon(shared: Daemon) -> None:
    chosen = {shared.create()["instance_id"] for _ in range(3)}
    assert len(chosen) == 3
    assert all(str(uuid.UUID(instance_id)) == instance_id for instance_id in chosen)


def test_never_part_of_a_path(shared: Daemon) -> None:
    instance_id = "named-like-nothing-else"
    shared.create(instance_id=instance_id)
    shared.wait_state(instance_id, "ready")
    names = [str(path) for path in Path(shared.state_dir).rglob("*")]
    assert any(name.endswith(".log") for name in names)
    assert not [name for name in names if instance_id in name]


def test_quoted_id_is_the_id(shared: Daemon) -> None:
    shared.create(instance_id="a.b")
    assert raw(shared, "GET", f"{INSTANCES}/{quote('a.b')}".replace(".", "%2E"))[0] == 200
