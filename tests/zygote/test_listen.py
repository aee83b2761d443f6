"""Where a zygote listens: only its owner may come in, and it takes nobody's place."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bullpen.zygote.server import listen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o750, 0o755, 0o777])
def test_a_folder_that_lets_others_in_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="must belong to you and have mode 0700"):
        listen(folder / "sock")
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder away needs root")
def test_somebody_elses_folder_is_refused(folder: Path) -> None:
    os.chown(folder, 12345, -1)
    with pytest.raises(PermissionError, match="must belong to you"):
        listen(folder / "sock")


def test_a_missing_folder_is_made_for_its_owner_alone(folder: Path) -> None:
    path = folder / "deep" / "er" / "sock"
    with listen(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(5)
        client.connect(str(path))
        assert listener.accept()[0].fileno() > 0
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_abandoned_socket_is_replaced(folder: Path) -> None:
    listen(folder / "sock").close()
    assert (folder / "sock").exists()
    with listen(folder / "sock"), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(folder / "sock"))


def test_a_socket_in_use_is_left_alone(folder: Path) -> None:
    with listen(folder / "sock") as first:
        with pytest.raises(OSError, match="in use"):
            listen(folder / "sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(folder / "sock"))
            assert first.accept()[0].fileno() > 0


def test_a_file_of_that_name_is_left_alone(folder: Path) -> None:
    (folder / "sock").write_text("precious")
    with pytest.raises(OSError, match="in use"):
        listen(folder / "sock")
    assert (folder / "sock").read_text() == "precious"


def test_a_path_that_is_too_long_is_said_to_be(folder: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        listen(folder / ("s" * 120))
