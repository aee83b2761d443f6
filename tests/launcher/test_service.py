"""The service, however it is started: as a module, or as an application of uvicorn."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import bullpen.launcher
from tests.support.daemon import Daemon
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES, watching

STOP_SECONDS = 30.0
"""Far more than an end may take where no instance is stubborn."""
UVICORN = [sys.executable, "-m", "uvicorn", "--port", "0", "--log-level", "info", "bullpen.launcher:app"]


def start(way: str, state_dir: Path, **settings: Any) -> Daemon:
    command = UVICORN if way == "uvicorn" else None
    daemon = Daemon(state_dir, command=command, stop_timeout=STOP_SECONDS, **settings)
    if way == "uvicorn":
        daemon.url = daemon.wait_line("Uvicorn running on ").partition(" on ")[2].split()[0]
    else:
        daemon.wait_ready()
    return daemon


@pytest.fixture(params=["module", "uvicorn"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(way: str, tmp_path: Path) -> Iterator[Daemon]:
    daemon = start(way, tmp_path / "state")
    yield daemon.wait_warm()
    if daemon.process.poll() is None:
        daemon.end()


def test_serves_the_same(service: Daemon) -> None:
    assert service.http.get("/health").json() == {"status": "OK"}
    assert service.http.get("/").json()["name"] == "Multi-Instance vLLM Management API"
    created = service.create(instance_id="one")
    service.wait_state("one", "ready")
    assert httpx.get(f"{created['url']}/health").status_code == 200
    assert service.delete("one")["status"] == "terminated"
    assert service.http.post("/v1/vllm", json={"options": "m"}).json()["status"] == "started"
    assert service.http.post(INSTANCES, json={"options": ""}).status_code == 422
    assert service.http.get(INSTANCES, headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), (["--port", "1"], 2), (["x"], 2)])
def test_module_takes_no_arguments(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "bullpen.launcher", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=STOP_SECONDS, check=False)
    assert done.returncode == code
    said, silent = (done.stderr, done.stdout) if code else (done.stdout, done.stderr)
    assert "BULLPEN_*" in said and "`bullpen serve --help`" in said and said.count("\n") == 1 and not silent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_with_streams_open(service: Daemon, number: signal.Signals) -> None:
    pids = [service.create(instance_id=name)["pid"] for name in ("a", "b")]
    service.wait_state("a", "ready")
    follow = httpx.Client(base_url=service.url, timeout=STOP_SECONDS)
    with (
        watching(service) as watch,
        watching(service, events="all"),
        follow.stream("GET", f"{INSTANCES}/a/log", params={"follow": "true"}) as log,
    ):
        assert log.status_code == 200
        service.process.send_signal(number)
        service.process.wait(STOP_SECONDS / 3)
        watch.wait_end()
    assert not [pid for pid in pids if is_alive(pid)]
    # uvicorn's own command ends by the signal that it was sent, as is its habit.
    assert service.process.returncode in (0, -number)


def test_key_holds(way: str, tmp_path: Path) -> None:
    daemon = start(way, tmp_path / "state", access_key="k")
    try:
        assert daemon.http.get(INSTANCES).status_code == 401
        assert daemon.http.get(INSTANCES, headers={"Authorization": "Bearer k"}).status_code == 200
    finally:
        daemon.end()


def test_restart_in_the_other_way(tmp_path: Path) -> None:
    """It is one service: the state directory of the one is that of the other."""
    first = start("module", tmp_path / "state").wait_warm()
    pid = first.create(instance_id="kept")["pid"]
    first.kill()
    second = start("uvicorn", tmp_path / "state")
    try:
        assert second.instance("kept")["pid"] == pid
    finally:
        second.end()
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("variable", "value"), [("BULLPEN_STOP_TIMEOUT", "soon"), ("BULLPEN_ENGINE", "none"), ("BULLPEN_PORT", "x")]
)
def test_setting_that_cannot_be_used(tmp_path: Path, variable: str, value: str) -> None:
    daemon = Daemon(tmp_path / "state", environment={variable: value})
    assert daemon.process.wait(20) == 2
    daemon.wait_line(variable)


def test_application_is_made_only_when_asked_for() -> None:
    assert "app" not in vars(bullpen.launcher), "a script that uses the classes reads no settings of a service"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = bullpen.launcher.no_such_name
