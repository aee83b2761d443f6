"""How long a call is tried again when the connection is lost."""

from __future__ import annotations

import asyncio
import random
import time

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0


class Patience:
    """Pauses that grow, within a budget of seconds that begins with the first failure."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.renew()

    def renew(self) -> None:
        """Have the whole budget again: there was an answer."""
        self._pause = FIRST_PAUSE_SECONDS
        self._began: float | None = None

    async def pause(self) -> bool:
        """Sleep a while before the next attempt; False, at once, where the budget is used up."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        left = self._began + self._budget - now
        if left <= 0:
            return False
        # Callers that lost the same server should not all come back in the same moment.
        await asyncio.sleep(min(left, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return True
