"""One daemon for all tests of the commands; each test leaves it without instances."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bullpen.client import BullpenClient
from tests.cli.terminal import Terminal
from tests.support.daemon import Daemon


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("shared")
    with Daemon(folder, stop_timeout=1, mock_gpus=True, mock_gpu_count=2) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No daemon is known, and nothing of this user's settings."""
    for name in ("BULLPEN_URL", "BULLPEN_ACCESS_KEY", "VLLM_ACCESS_KEY", "COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("BULLPEN_STATE_DIR", str(tmp_path / "nobody"))


@pytest.fixture
def client(shared: Daemon, nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[BullpenClient]:
    """A client of the daemon that the commands find in the environment."""
    monkeypatch.setenv("BULLPEN_URL", shared.url)
    with BullpenClient() as client:
        yield client
        client.delete_all()


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """Run commands on terminals of their own, which are closed when the test ends."""
    opened: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()
