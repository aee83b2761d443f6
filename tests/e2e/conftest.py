"""Daemons whose instances sleep, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.sleepers import SMALL_GPU, Start
from tests.support.daemon import Daemon


@pytest.fixture
def start(start_daemon: Start) -> Start:
    """Start daemons with small mock GPUs."""

    def begin(*arguments: Any, **settings: Any) -> Daemon:
        settings = {"mock_gpus": 1, "mock_gpu_memory": SMALL_GPU, "sleep_timeout": 5, "wake_timeout": 5, **settings}
        return start_daemon(*arguments, **settings).wait_warm()

    return begin


@pytest.fixture
def helpers() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor(8) as pool:
        yield pool
