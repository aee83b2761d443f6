"""What is done every few seconds whatever happens: logs kept short, orphans reaped, what could not be saved saved."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from bullpen.core.fleet import Fleet
from bullpen.node.executor import Executor
from bullpen.node.resources import Resources

logger = logging.getLogger("bullpen")

SECONDS = 2.0
REFRESH_SECONDS = 30.0
"""How old the knowledge of who was used last may be; who is to go for another is asked anew."""


class Housekeeping:
    """Goes on in the background from its making to its `end`."""

    def __init__(self, fleet: Fleet, resources: Resources, executor: Executor) -> None:
        self._fleet = fleet
        self._resources = resources
        self._executor = executor
        self._refreshed = 0.0
        self._task = asyncio.ensure_future(self._go_on())

    def end(self) -> None:
        """Do nothing any more."""
        self._task.cancel()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(SECONDS)
            try:
                await self._once()
            except Exception:
                logger.exception("housekeeping failed; this is a bug in Bullpen")

    async def _once(self) -> None:
        self._executor.save_again()
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            await self._executor.refresh_activity()
        for instance in self._fleet.listed():
            self._resources.logs.enforce_cap(instance.key)
        if threading.current_thread() is threading.main_thread():
            # A program that has the supervisor in a thread has children of its own.
            zygotes = {zygote.pid for zygote in self._resources.zygotes.all()}
            self._resources.trees.reap_orphans(zygotes | self._executor.children())
        if self._resources.journal.is_due():
            await asyncio.to_thread(self._resources.journal.checkpoint)
