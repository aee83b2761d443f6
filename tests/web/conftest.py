"""One daemon that most tests of the REST API share, and that each of them finds without instances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.support.daemon import Daemon
from tests.web.calls import STOP_SECONDS


@pytest.fixture(scope="session")
def session_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    state_dir = tmp_path_factory.mktemp("shared") / "state"
    settings: dict[str, Any] = {
        "mock_gpus": True,
        "mock_gpu_count": 2,
        "stop_timeout": STOP_SECONDS,
        "log_level": "debug",
    }
    with Daemon(state_dir, **settings) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def shared(session_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon with two mock GPUs and no access key; instances end with the test."""
    yield session_daemon
    reply = session_daemon.http.delete("/v2/vllm/instances")
    assert reply.status_code == 200, reply.text


@pytest.fixture
def outliving() -> Iterator[Callable[[int], psutil.Process]]:
    """Take note of a process that outlives its daemon, so that it does not outlive the test."""
    noted: list[psutil.Process] = []

    def note(pid: int) -> psutil.Process:
        process = psutil.Process(pid)
        noted.extend([process, *process.children(recursive=True)])
        return process

    yield note
    for process in noted:
        if process.is_running():
            process.kill()
