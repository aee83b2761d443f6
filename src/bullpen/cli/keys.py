"""Single keys from a terminal."""

from __future__ import annotations

import os
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reading_keys(pressed: Callable[[str], None]) -> Iterator[None]:
    """Call ``pressed``, in another thread, with each key that is pressed, until the block ends.

    Keys are not shown meanwhile, and Ctrl-C is a signal as ever. Without a terminal at the input nothing is read.
    """
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    threading.Thread(target=read, args=(descriptor, pressed), daemon=True).start()
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


def read(descriptor: int, pressed: Callable[[str], None]) -> None:
    """Read keys until the terminal is gone."""
    try:
        while data := os.read(descriptor, 64):
            for key in data.decode(errors="replace"):
                pressed(key)
    except OSError:
        pass
