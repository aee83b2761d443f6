"""What the demo raises when a step does not do what it promises."""

from __future__ import annotations

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
