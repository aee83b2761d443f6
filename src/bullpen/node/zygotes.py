"""The zygotes of a daemon: one for each engine and set of import-time variables, replaced when they die."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bullpen.errors import LaunchError
from bullpen.node.zygote import Zygote, ZygoteCommand

logger = logging.getLogger("bullpen")

RETRY_SECONDS = (0.2, 1.0, 5.0, 15.0, 60.0)
"""Pauses before a zygote that died is started again; the last one repeats."""

Key = tuple[str, tuple[tuple[str, str], ...]]
"""An engine's name, and the import-time variables that one of its zygotes has beside the daemon's."""


class Zygotes:
    """The zygotes of a daemon: one for each engine and set of import-time variables, replaced when they die.

    Args:
        pythons: the interpreter of each engine.
        environment: what every zygote gets.
        folder: where sockets go.
        logs: where output goes.
        spares: processes that each keeps forked ahead.
        limit: how many extra ones, beside one for each engine, are kept warm.
    """

    def __init__(
        self,
        pythons: Mapping[str, str],
        environment: Mapping[str, str],
        folder: Path,
        logs: Path,
        spares: int,
        limit: int = 3,
    ) -> None:
        self._pythons = pythons
        self._environment = environment
        self._folder = folder
        self._logs = logs
        self._spares = spares
        self._limit = limit
        self._zygotes: dict[Key, Zygote] = {}
        self._failures: dict[str, int] = {}
        self._closing = False
        self._restarts: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()

    def all(self) -> Sequence[Zygote]:
        """The zygotes there are now, those with variables of their own last."""
        return sorted(self._zygotes.values(), key=lambda zygote: bool(zygote.command.early))

    def readiness(self, engine: str) -> dict[str, Any]:
        """Whether instances of an engine can be forked (``ready``), and the state of each zygote, as JSON data."""
        zygotes = [
            {
                "engine": zygote.command.engine,
                "pid": zygote.pid,
                "environment": sorted(dict(zygote.command.early)),
                **zygote.warmth.describe(),
            }
            for zygote in self.all()
        ]
        # One with variables of its own is no use to an instance without them.
        ready = any(
            zygote["engine"] == engine and zygote["state"] == "warm" and not zygote["environment"] for zygote in zygotes
        )
        return {"ready": ready, "engine": engine, "zygotes": zygotes}

    def get(self, engine: str, early: Mapping[str, str]) -> Zygote:
        """The zygote for an engine with these import-time variables; it is started where there is none.

        Raises:
            LaunchError: it cannot be started.
        """
        wanted = {name: value for name, value in early.items() if self._environment.get(name) != value}
        key = (engine, tuple(sorted(wanted.items())))
        zygote = self._zygotes.get(key)
        if zygote is None:
            if self._closing:
                raise LaunchError("this daemon is ending; ask again when it is back")
            if key[1]:
                self._make_room()
            zygote = self._zygotes[key] = self._start(key)
        return zygote

    def _start(self, key: Key) -> Zygote:
        engine, early = key
        if engine not in self._pythons:
            raise LaunchError(f"no engine {engine!r} is set up here; there are: {', '.join(self._pythons)}")
        command = ZygoteCommand(engine, self._pythons[engine], {**self._environment, **dict(early)}, early)
        try:
            # A spare of a rarely used environment is memory for nothing.
            spares = 0 if early else self._spares
            return Zygote(command, self._folder, self._logs / f"zygote-{engine}.log", spares, self._zygote_ended)
        except (OSError, ValueError) as problem:
            raise LaunchError(
                f"engine {engine}: its zygote cannot be started with {command.python}: {problem}"
            ) from problem

    def _make_room(self) -> None:
        """Retire the extra zygotes that were asked for longest ago. One that somebody waits for stays, so that for a
        while there may be more than the limit."""
        extra = [key for key in self._zygotes if key[1]]
        idle = sorted((key for key in extra if not self._zygotes[key].waiting), key=self._last_used)
        for key in idle[: max(0, len(extra) + 1 - self._limit)]:
            keep(self._retiring, asyncio.ensure_future(self._zygotes.pop(key).close()))

    def _last_used(self, key: Key) -> float:
        return self._zygotes[key].used_at

    def _zygote_ended(self, zygote: Zygote) -> None:
        key = (zygote.command.engine, zygote.command.early)
        if self._closing or self._zygotes.get(key) is not zygote:
            return
        failures = 0 if zygote.was_settled else self._failures.get(key[0], 0)
        self._failures[key[0]] = failures + 1
        # One that worked makes room, so that creates wait for the next one. One that never did stays, broken, so that
        # a create is answered with the reason at once.
        if zygote.was_warm or zygote.command.early:
            del self._zygotes[key]
        # An extra zygote comes back when it is asked for again, the engine's own by itself.
        if not zygote.command.early:
            keep(self._restarts, asyncio.ensure_future(self._restart(key, zygote, failures)))

    async def _restart(self, key: Key, dead: Zygote, failures: int) -> None:
        """Start another one in place of ``dead``, after a pause that grows with the failures before."""
        pause = 0.0 if dead.was_settled else retry_pause(failures)
        while True:
            await asyncio.sleep(pause)
            if self._closing or self._zygotes.get(key) not in (None, dead):
                return
            try:
                self._zygotes[key] = self._start(key)
            except LaunchError as problem:
                logger.error("%s", problem)
                failures += 1
                pause = retry_pause(failures)
            else:
                return

    async def close(self) -> None:
        """End all zygotes."""
        self._closing = True
        for task in list(self._restarts):
            task.cancel()
        living = [zygote.close() for zygote in self._zygotes.values()]
        await asyncio.gather(*living, *self._retiring, return_exceptions=True)


def retry_pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]


def keep(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    """Keep a task from being forgotten until it is done."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)
