"""Launches as their callers see them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call, compare, held

WORDS = ("bootstrapping", "ready", "stopping", "stopped", "failed")
ENDED = ("stopped", "failed")
STOP_SECONDS = 5.0
"""What a stop may take, by contract."""
AWAKE_MIB, ASLEEP_MIB = 1024, 64
"""What the simulator's engine holds on each of its GPUs."""

Document = dict[str, Any]


def launch(daemon: Daemon, model: str = "m", **fields: Any) -> Document:
    """Launch a model; that must succeed."""
    code, document = call(f"{daemon.url}/launch", "POST", {"model": model, **fields})
    assert code == 201, document
    return dict(document)


def status(daemon: Daemon, launch_id: str) -> Document:
    """Describe a launch. The connection is kept: a new one each time would use up the host's ports."""
    reply = daemon.http.get(f"/status/{launch_id}")
    assert reply.status_code == 200, reply.text
    document = dict(reply.json())
    assert document["state"] in WORDS
    return document


def reach(daemon: Daemon, launch_id: str, *states: str, seconds: float = 30.0) -> Document:
    """Wait until a launch is in one of the states."""
    found: list[Document] = []

    def there() -> bool:
        found.append(status(daemon, launch_id))
        return found[-1]["state"] in states

    wait_until(there, seconds, lambda: str(found[-1]))
    return found[-1]


def loading(daemon: Daemon, launch_id: str) -> Document:
    """Wait until a launch has a process."""
    wait_until(lambda: status(daemon, launch_id)["pid"] is not None, describe=lambda: str(status(daemon, launch_id)))
    return status(daemon, launch_id)


def stop(daemon: Daemon, launch_id: str) -> Document:
    """Stop a launch, in the time that it may take."""
    code, document = call(f"{daemon.url}/stop/{launch_id}", "POST", seconds=STOP_SECONDS)
    assert code == 200, document
    return dict(document)


def log_of(daemon: Daemon, launch_id: str) -> str:
    """The first piece of a launch's log."""
    code, piece = call(f"{daemon.url}/logs/{launch_id}")
    assert code == 200, piece
    return str(piece["content"])


def log_file(pid: int) -> Path:
    """The file that a server writes its log to."""
    return Path(os.readlink(f"/proc/{pid}/fd/1"))


def in_flight(document: Document) -> int:
    """How many requests a launch's server has, by its own word."""
    code, gate = call(f"{document['url']}/bullpen/gate")
    assert code == 200, gate
    return int(gate["in_flight"])


def complaints(daemon: Daemon) -> list[str]:
    """What is wrong with what a daemon says of its launches, one sentence each."""
    found = compare(daemon.url, daemon.state_dir, AWAKE_MIB, ASLEEP_MIB)
    _, listed = call(f"{daemon.url}/v2/vllm/instances")
    told = [status(daemon, one["instance_id"]) for one in listed["instances"]]
    for document, instance in zip(told, listed["instances"], strict=True):
        state = "failed" if instance.get("error") else instance["state"]
        if (document["state"], document["pid"]) != (state, instance["pid"]):
            found.append(f"{document} and {instance} are not the same")
    alive = sorted((one for one in told if one["state"] not in ENDED), key=lambda one: str(one["created_at"]))
    _, current = call(f"{daemon.url}/launch")
    if current != alive:
        found.append(f"/launch has {current}, not {alive}")
    _, stats = call(f"{daemon.url}/stats")
    on_gpus = held(daemon.state_dir)
    for gpu in stats["gpus"]:
        owners = [one["launch_id"] for one in alive if gpu["gpu_id"] in one["gpu_ids"]]
        mib = sum(on_gpus[gpu["gpu_id"]].values())
        if (gpu["launch_ids"], gpu["memory_used_mib"]) != (owners, mib):
            found.append(f"/stats has {gpu}, not {owners} with {mib} MiB")
    return found


def settle(daemon: Daemon, seconds: float = 20.0) -> None:
    """Wait until all that was begun has ended; then nothing that the daemon says is wrong."""
    deadline = time.monotonic() + seconds
    while found := complaints(daemon):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
