"""When the tokens of a request are made: at a set rate, not while the engine sleeps, not after it died."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class EngineDeadError(Exception):
    """The engine child has ended, so that no request can be answered any more."""

    def __init__(self) -> None:
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.")


class Scheduler:
    """Knows which requests run and which wait, and wakes them when that changes.

    All methods belong to the event loop's thread. A request that comes while the engine is paused waits; one that runs
    when the engine is paused goes on (mode `wait`), stands still (`keep`) or ends with what it has (`abort`).
    """

    def __init__(self, tokens_per_second: float) -> None:
        self.tokens_per_second = tokens_per_second
        self.paused = False
        self.frozen = False
        self.dead = False
        self._generations: set[Generation] = set()
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def running(self) -> int:
        """How many requests have been admitted."""
        return sum(generation.admitted for generation in self._generations)

    @property
    def waiting(self) -> int:
        """How many requests wait for the engine to wake."""
        return len(self._generations) - self.running

    async def pause(self, mode: str) -> None:
        """Admit no request any more; with mode `wait`, return when those that run have ended."""
        self.paused = True
        self.frozen = mode != "wait"
        if mode == "abort":
            self.abort_all()
        self._notify()
        while mode == "wait" and self.running and not self.dead:
            await self.changed(None)

    def resume(self) -> None:
        """Let waiting and frozen requests run."""
        self.paused = self.frozen = False
        self._notify()

    def abort_all(self) -> None:
        """End every request with the tokens that it has."""
        for generation in self._generations:
            generation.aborted = True
        self._notify()

    def fail(self) -> None:
        """Let every request, now and later, fail with EngineDeadError."""
        self.dead = True
        self._notify()

    @contextmanager
    def generation(self, total: int) -> "Iterator[Generation]":
        """Hold a place for a request of `total` tokens."""
        generation = Generation(self, total)
        self._generations.add(generation)
        try:
            yield generation
        finally:
            self._generations.discard(generation)
            if self.paused:
                self._notify()

    async def changed(self, seconds: float | None) -> None:
        """Wait until something changes, or until so many seconds have passed."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, _set, waiter)
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if timer:
                timer.cancel()

    def _notify(self) -> None:
        for waiter in self._waiters:
            _set(waiter)


class Generation:
    """The tokens of one request, counted as they are made."""

    def __init__(self, scheduler: Scheduler, total: int) -> None:
        self.admitted = not scheduler.paused
        self.aborted = False
        self.made = 0
        self._scheduler = scheduler
        self._total = total
        self._since: float | None = None  # the loop time at which token 0 was due, None while standing still

    @property
    def finish_reason(self) -> str | None:
        """Why the request has ended, as the API names it; None while it goes on."""
        if self.made >= self._total:
            return "length"
        return "abort" if self.aborted else None

    async def advance(self, target: int) -> int:
        """Wait until `target` tokens are made or the request is aborted; return how many are made.

        Raises EngineDeadError.
        """
        rate = self._scheduler.tokens_per_second
        while True:
            if self._scheduler.dead:
                raise EngineDeadError
            now = asyncio.get_running_loop().time()
            if self._since is not None:
                self.made = max(self.made, min(self._total, int((now - self._since) * rate + 1e-6)))
            if self.made >= target or self.aborted:
                return self.made
            self.admitted = self.admitted or not self._scheduler.paused
            if not self.admitted or self._scheduler.frozen:
                self._since = None
                await self._scheduler.changed(None)
                continue
            if self._since is None:
                self._since = now - self.made / rate
            await self._scheduler.changed(self._since + target / rate - now)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
