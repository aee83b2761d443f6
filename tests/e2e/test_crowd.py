"""A hundred instances at once, and nothing of them left after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import command_lines, open_descriptors

CROWD = 100


def test_a_hundred_instances(start_daemon: Callable[..., Daemon]) -> None:
    """All start, are listed, answer and go; no process, port, file or descriptor is left."""
    # A short path, so that the folder for sockets lies inside and can be looked at.
    state = Path(tempfile.mkdtemp(dir="/tmp"))
    daemon = start_daemon(state).wait_warm()
    daemon.create(instance_id="first")
    daemon.wait_state("first", "ready")
    daemon.delete("first")
    descriptors = own_descriptors(daemon)
    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(lambda number: daemon.create(instance_id=f"crowd-{number}"), range(CROWD)))
    assert len({one["url"] for one in created}) == CROWD
    wait_until(
        lambda: {one["state"] for one in daemon.http.get("/v2/vllm/instances").json()["instances"]} == {"ready"}, 60
    )
    reply = daemon.http.delete("/v2/vllm/instances").json()
    assert reply["total_stopped"] == CROWD
    assert not [line for line in command_lines().values() if "bullpen: crowd-" in line]
    assert not list((daemon.state_dir / "logs").glob("[0-9a-f]*.log"))
    assert list((state / "run").iterdir()) == []
    wait_until(lambda: own_descriptors(daemon) <= descriptors + 2, 10, lambda: str(list_descriptors(daemon.pid)))
    listening = Path("/proc/net/tcp").read_text()
    ports = {int(one["url"].rpartition(":")[2]) for one in created}
    assert not [port for port in ports if f":{port:04X} 00000000:0000 0A" in listening]


def own_descriptors(daemon: Daemon) -> int:
    """How many descriptors a daemon has open, without the connections that this process keeps to it."""
    kept = [
        one
        for one in psutil.Process().net_connections("tcp")
        if one.raddr and one.raddr.port == urlsplit(daemon.url).port
    ]
    return open_descriptors(daemon.pid) - len(kept)


def list_descriptors(pid: int) -> list[str]:
    """What a process has open."""
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
