"""Long work in short steps, between which the event loop gets to everything else: other calls, and the REST API."""

from __future__ import annotations

import asyncio

LARGE = 256 * 1024
"""In bytes or characters: about a millisecond's work. Whatever may be larger is done in steps of this size."""


class Turns:
    """Makes the long work of all calls take turns: one step at most each time that the event loop goes round."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Wait for the turn of one step, to be done right after this."""
        async with self._lock:
            await asyncio.sleep(0)
