"""``bullpen`` as people run it: as a process, on a terminal or without one."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from fcntl import ioctl
from typing import Any

COMMAND = [sys.executable, "-m", "bullpen"]
SECONDS = 30.0
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def bullpen(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, without a terminal."""
    settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": SECONDS, **options}
    return subprocess.run([*COMMAND, *arguments], check=False, **settings)


class Terminal:
    """A command on a terminal of its own: ``bullpen`` with these arguments, or another ``command``.

    ``text`` is what it has shown, without colours and movements; ``raw`` has them.
    """

    def __init__(self, *arguments: str, columns: int = 80, command: Sequence[str] = COMMAND) -> None:
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        # Not setsid alone: the terminal must be the command's own, so that Ctrl-C typed there is a signal to it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *command, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.raw = b""

    @property
    def text(self) -> str:
        """All that was shown so far."""
        return ESCAPE.sub("", self.raw.decode(errors="replace"))

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        return bool(data)

    def wait_for(self, text: str) -> str:
        """Wait until a text was shown; return all that was."""
        deadline = time.monotonic() + SECONDS
        while text not in self.text:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"no {text!r} in:\n{self.text}")
        return self.text

    def type(self, keys: str) -> None:
        """Press keys; ``\\x03`` is Ctrl-C."""
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Wait for the command's end and return its exit code."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        """Hang up, and end what still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS)
        os.close(self._master)
