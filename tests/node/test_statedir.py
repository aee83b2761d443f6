"""The state directory: one daemon at a time, nobody else's eyes, short paths for sockets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bullpen.errors import StateError
from bullpen.node.statedir import LONGEST_SOCKET_FOLDER, StateDir, make_log_dir
from bullpen.paths import default_state_dir


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def short_temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for what goes into the system's own otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="bp", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "deep" / "state")
    assert [mode(path) for path in (state.path, state.logs, state.sockets)] == [0o700] * 3
    assert mode(state.path / "daemon.pid") == 0o600
    assert (state.path / "daemon.pid").read_text() == f"{os.getpid()}\n"
    state.close()
    assert (state.path / "daemon.pid").read_text() == ""


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    """It may be /tmp; what is put into it guards itself."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "somebodys").touch()
    (tmp_path / "state").chmod(0o755)
    state = StateDir(tmp_path / "state")
    assert mode(state.path) == 0o755
    assert [mode(path) for path in (state.logs, state.sockets)] == [0o700] * 2
    state.close()


def test_an_empty_folder_or_one_used_before_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    state = StateDir(tmp_path / "state")
    assert mode(state.path) == 0o700
    state.journal.touch()
    state.close()
    state.path.chmod(0o755)
    again = StateDir(tmp_path / "state")
    assert mode(again.path) == 0o700
    again.close()


def test_a_second_daemon_is_told_of_the_first(tmp_path: Path) -> None:
    first = StateDir(tmp_path / "state")
    with pytest.raises(StateError, match=rf"another Bullpen \(pid {os.getpid()}\) uses .*--state-dir"):
        StateDir(tmp_path / "state")
    first.close()
    StateDir(tmp_path / "state").close()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from bullpen.node.statedir import StateDir\n"
        "state = StateDir(pathlib.Path(sys.argv[1])); print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "state")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mine\n"
        with pytest.raises(StateError, match=rf"\(pid {process.pid}\)"):
            StateDir(tmp_path / "state")
        process.kill()
    StateDir(tmp_path / "state").close()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere; see the next one")
def test_an_unwritable_folder_is_said_to_be(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match=r"cannot be used: Permission denied; make it writable, or give another"):
        StateDir(tmp_path / "state")


def test_a_folder_for_logs_is_made_for_its_owner_alone_or_stays_as_it_is(tmp_path: Path) -> None:
    made = make_log_dir(tmp_path / "deep" / "logs")
    assert mode(made) == 0o700 and list(made.iterdir()) == []
    made.chmod(0o755)
    assert mode(make_log_dir(made)) == 0o755


@pytest.mark.parametrize("place", ["/proc/nowhere/logs", "/proc", "{file}/logs", "{file}"])
def test_a_folder_for_logs_that_cannot_be_is_said_to_be(tmp_path: Path, place: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StateError, match=r"the folder for logs .* cannot be used: .*; make it .* with --log-dir"):
        make_log_dir(Path(place.format(file=file)))


@pytest.mark.parametrize("place", ["/proc/nowhere/state", "{file}/state", "{file}"])
def test_a_folder_that_cannot_be_is_said_to_be(tmp_path: Path, place: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StateError, match=r"the state directory .* cannot be used: .*; make it writable, or give"):
        StateDir(Path(place.format(file=file)))


def test_a_long_path_has_its_sockets_elsewhere(tmp_path: Path, short_temporary: Path) -> None:
    state = StateDir(tmp_path / ("long" * 20))
    assert state.sockets.parent == short_temporary
    assert len(os.fsencode(state.sockets)) <= LONGEST_SOCKET_FOLDER
    assert mode(state.sockets) == 0o700
    state.close()
    again = StateDir(tmp_path / ("long" * 20))
    assert again.sockets == state.sockets, "the next daemon finds them"
    again.close()
    other = StateDir(tmp_path / ("long" * 21))
    assert other.sockets != state.sockets
    other.close()


def test_a_short_path_has_them_inside(short_temporary: Path) -> None:
    state = StateDir(short_temporary / "s")
    assert state.sockets == short_temporary / "s" / "run"
    state.close()


def test_a_link_in_place_of_the_folder_for_sockets_is_a_trick(tmp_path: Path, short_temporary: Path) -> None:
    """Its name can be known ahead, and anyone may write to the system's temporary folder."""
    state = StateDir(tmp_path / ("long" * 20))
    state.close()
    assert not state.sockets.exists(), "it goes with the daemon"
    precious = tmp_path / "precious"
    precious.mkdir()
    precious.chmod(0o755)
    state.sockets.symlink_to(precious)
    with pytest.raises(StateError, match="is not a folder of yours"):
        StateDir(tmp_path / ("long" * 20))
    assert mode(precious) == 0o755
    state.sockets.unlink()
    StateDir(tmp_path / ("long" * 20)).close()


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder away needs root")
def test_somebody_elses_folder_for_sockets_is_refused(tmp_path: Path, short_temporary: Path) -> None:
    state = StateDir(tmp_path / ("long" * 20))
    state.close()
    state.sockets.mkdir()
    os.chown(state.sockets, 12345, -1)
    with pytest.raises(StateError, match="is not a folder of yours; remove it, or give another --state-dir"):
        StateDir(tmp_path / ("long" * 20))


def test_an_instances_folder_goes_with_everything_in_it(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    folder = state.instance_folder("0123456789abcdef")
    folder.mkdir()
    (folder / "engine.sock").write_text("")
    state.remove_instance_folder("0123456789abcdef")
    state.remove_instance_folder("0123456789abcdef")
    assert not folder.exists()
    state.close()


def test_the_default_is_where_the_user_keeps_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x/state")
    assert default_state_dir() == Path("/x/state/bullpen")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_state_dir() == Path("/home/me/.local/state/bullpen")
