"""What tests of sleepers do with a daemon: create, sleep and wake instances, ask them, look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from tests.support.daemon import Daemon, wait_until
from tests.support.truth import compare

AWAKE_MIB, ASLEEP_MIB = 1000, 64
SIM = {"BULLPEN_SIM_AWAKE_MIB": str(AWAKE_MIB), "BULLPEN_SIM_ASLEEP_MIB": str(ASLEEP_MIB)}
SMALL_GPU = 1500
"""MiB: room for one that is awake and a few sleepers."""
QUESTION = {"model": "m", "prompt": "hello", "max_tokens": 4}

Start = Callable[..., Daemon]


def create(daemon: Daemon, name: str, gpu: int, **fields: Any) -> dict[str, Any]:
    """Create an instance that serves `m` on one GPU, and wait until it is ready."""
    variables = {**SIM, **fields.pop("env_vars", {})}
    daemon.create(instance_id=name, env_vars=variables, gpu_uuids=[str(gpu)], **fields)
    return daemon.wait_state(name, "ready")


def do(daemon: Daemon, name: str, verb: str, **query: Any) -> httpx.Response:
    """Sleep or wake."""
    return daemon.http.post(f"/v2/vllm/instances/{name}/{verb}", params=query)


def done(daemon: Daemon, name: str, verb: str, **query: Any) -> dict[str, Any]:
    """The same; it must succeed."""
    reply = do(daemon, name, verb, **query)
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


def ask(url: str, seconds: float = 20.0, **fields: Any) -> httpx.Response:
    """A completion."""
    return httpx.post(f"{url}/v1/completions", json={**QUESTION, **fields}, timeout=seconds)


def notes(daemon: Daemon, name: str) -> list[str]:
    """What was decided about an instance."""
    return [note["text"] for note in daemon.http.get(f"/v2/vllm/instances/{name}/explain").json()["notes"]]


def is_settled(daemon: Daemon) -> bool:
    """Whether nothing is under way."""
    listed = daemon.http.get("/v2/vllm/instances").json()["instances"]
    return all("activity" not in one and one["state"] not in ("starting", "stopping") for one in listed)


def agree(daemon: Daemon, seconds: float = 10.0) -> None:
    """Wait until the book is equal to reality."""
    wait_until(lambda: not wrong(daemon), seconds, lambda: str(wrong(daemon)))


def wrong(daemon: Daemon) -> list[str]:
    """What is wrong with the book."""
    return compare(daemon.url, daemon.state_dir, AWAKE_MIB, ASLEEP_MIB)


def states(daemon: Daemon) -> dict[str, Any]:
    """Each instance's state; of a sleeper, how it sleeps."""
    listed = daemon.http.get("/v2/vllm/instances").json()["instances"]
    return {
        one["instance_id"]: "emulated" if one.get("sleep_emulated") else one.get("sleep_level", one["state"])
        for one in listed
    }


def stage_of(daemon: Daemon, name: str) -> str:
    """What is being done with an instance."""
    activity = daemon.instance(name).get("activity")
    return f"{activity['doing']}: {activity['stage']}" if activity else ""
