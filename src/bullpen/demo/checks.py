"""The demo's promises: each is checked, and each wait has an end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bullpen.errors import BullpenError


class DemoError(BullpenError):
    """A step of the demo went wrong; the text says which, how, and where to look."""


def expect(condition: bool, otherwise: str) -> None:
    """Check one promise of the demo.

    Raises:
        DemoError: it is not kept; the text is ``otherwise``.
    """
    if not condition:
        raise DemoError(otherwise)


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Let a step take so long and no longer. Only for the main thread, and not one inside another.

    Raises:
        DemoError: it takes longer; the text says ``what`` it is that takes so long.
    """

    def give_up(number: int, frame: FrameType | None) -> None:
        raise DemoError(f"{what} takes longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
