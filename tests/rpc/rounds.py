"""How often the event loop has gone round: what happens in one round is one step to everybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Rounds:
    """Counts the rounds of the event loop."""

    count = 0

    def go(self) -> None:
        """Count this round, and the next."""
        self.count += 1
        self.handle = asyncio.get_running_loop().call_soon(self.go)


@asynccontextmanager
async def counted() -> AsyncIterator[Rounds]:
    """Count for as long as the context lasts."""
    rounds = Rounds()
    rounds.go()
    try:
        yield rounds
    finally:
        rounds.handle.cancel()
