"""A state directory that nothing outlives, daemons in it, and gRPC channels to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon
from tests.support.truth import trees


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A state directory; servers that a failed test leaves behind are killed."""
    folder = tmp_path / "state"
    yield folder
    for pids in trees(folder).values():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start_here(state_dir: Path, start_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """Start daemons in the state directory, one after the other."""

    def start(**settings: Any) -> Daemon:
        return start_daemon(state_dir, **settings)

    return start
