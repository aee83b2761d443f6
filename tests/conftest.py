"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons that end, with their instances, when the test does."""
    started: list[Daemon] = []

    def start(state_dir: Path | None = None, **settings: Any) -> Daemon:
        daemon = Daemon(state_dir or tmp_path / "state", **settings)
        started.append(daemon)
        return daemon.wait_ready()

    yield start
    for daemon in reversed(started):
        if daemon.process.poll() is None:
            daemon.end()


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon on the simulator, warm."""
    return start_daemon().wait_warm()
