"""The state directory: one daemon's journal, logs and key; and the short folder for its sockets."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from bullpen.errors import StateError

LONGEST_SOCKET_FOLDER = 56
"""Bytes: a Unix socket's path has 107 at most; an instance's key and vLLM's own names take 50 of them."""


def make_log_dir(folder: Path) -> Path:
    """A folder for the instances' logs that is not the state directory's own; made where it is missing.

    Raises:
        StateError: it cannot be made or written.
    """
    path = folder.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as problem:
        raise StateError(
            f"the folder for logs {path} cannot be used: {problem.strerror or problem};"
            " make it writable, or give another one with --log-dir"
        ) from problem


class StateDir:
    """A state directory, locked for one daemon as long as this object is open.

    Raises:
        StateError: it cannot be made or written, or another daemon has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_our_own():
                self.path.chmod(0o700)
            self.logs.mkdir(mode=0o700, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as problem:
            raise StateError(
                f"the state directory {self.path} cannot be used: {problem.strerror or problem};"
                " make it writable, or give another one with --state-dir"
            ) from problem
        try:
            self.sockets = self._socket_folder()
        except OSError as problem:
            self._unlock()
            raise StateError(f"{self.path}: no folder for sockets can be made: {problem}") from problem
        except StateError:
            self._unlock()
            raise

    def _is_our_own(self) -> bool:
        """Whether the directory is Bullpen's alone: empty or used before. Another one keeps its mode, for it may be
        anything (/tmp, say); every file that Bullpen puts there guards itself."""
        own = self.path.stat().st_uid == os.getuid()
        return own and (self.journal.exists() or next(self.path.iterdir(), None) is None)

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / "journal.sqlite"

    @property
    def logs(self) -> Path:
        """Where logs are, or links to those that a setting has elsewhere."""
        return self.path / "logs"

    @property
    def access_key(self) -> Path:
        """Where the key is left for the commands on this host."""
        return self.path / "access_key"

    def _take_lock(self) -> int:
        descriptor = os.open(self.path / "daemon.pid", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StateError(
                f"another Bullpen (pid {pid}) uses the state directory {self.path};"
                " stop it, or give this one its own with --state-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def _socket_folder(self) -> Path:
        folder = self.path / "run"
        if len(os.fsencode(folder)) > LONGEST_SOCKET_FOLDER:
            digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
            folder = Path(tempfile.gettempdir()) / f"bullpen-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()  # a link to some folder of ours may be anyone's trick
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            raise StateError(f"{folder} is not a folder of yours; remove it, or give another --state-dir")
        folder.chmod(0o700)
        return folder

    @property
    def mock_gpus(self) -> Path:
        """Where simulators note what they hold of GPUs that do not exist."""
        return self.path / "mock-gpus"

    def instance_folder(self, key: str) -> Path:
        """The folder for an instance's own sockets. Its name is short, for paths of sockets are."""
        return self.sockets / key[:12]

    def remove_instance_folder(self, key: str) -> None:
        """Remove an instance's folder."""
        shutil.rmtree(self.instance_folder(key), ignore_errors=True)

    def leave_key(self, key: str | None) -> None:
        """Leave the key for the commands of the same user on this host; what an earlier daemon left goes."""
        self.access_key.unlink(missing_ok=True)
        if key:
            descriptor = os.open(self.access_key, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            os.write(descriptor, key.encode())
            os.close(descriptor)

    def close(self) -> None:
        """Let another daemon have it; what only a running one means is removed."""
        self.access_key.unlink(missing_ok=True)
        with suppress(OSError):  # servers that were kept have folders in there
            self.sockets.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        os.ftruncate(self._lock, 0)
        os.close(self._lock)
