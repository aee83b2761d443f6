"""The event bus: one counter, a buffer of what happened, and the watchers that hear it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from bullpen.errors import BullpenError

BUFFERED_EVENTS = 1000
"""Events that a watcher may be behind, as many as the contract asks for."""
QUEUED_LINES = 10_000
"""Lines that a watcher may leave unread before it is cut off."""
HEARTBEAT_SECONDS = 15.0


class RevisionGoneError(BullpenError):
    """The events after a revision are not there any more, or not yet."""


@dataclass(eq=False)
class Watcher:
    """One who listens. ``None`` in the queue ends the stream."""

    fine: bool
    lines: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)


class Bus:
    """Events with revisions, replayed to those who come back.

    Args:
        revision: the counter's value.
        events: what is known of the past, oldest first.
    """

    def __init__(self, revision: int = 0, events: Iterable[tuple[int, str]] = ()) -> None:
        self.revision = revision
        self._events: deque[tuple[int, str]] = deque(events, maxlen=BUFFERED_EVENTS)
        self._watchers: set[Watcher] = set()
        self._closed = False

    @property
    def watchers(self) -> int:
        """How many listen now."""
        return len(self._watchers)

    def publish(self, kind: str, document: dict[str, Any], revision: int) -> str:
        """Tell everyone of a change that advances the counter; return the line."""
        line = encode(kind, document)
        self.revision = revision
        self._events.append((revision, line))
        for watcher in list(self._watchers):
            self._tell(watcher, line)
        return line

    def publish_fine(self, kind: str, document: dict[str, Any]) -> None:
        """Tell those who asked for finer events; nothing is kept and the counter stays."""
        listeners = [watcher for watcher in self._watchers if watcher.fine]
        if listeners:
            line = encode(kind, document)
            for watcher in listeners:
                self._tell(watcher, line)

    def _tell(self, watcher: Watcher, line: str) -> None:
        if watcher.lines.qsize() >= QUEUED_LINES:
            # It does not read. Cut it off: it can come back with its last revision and lose nothing.
            self._watchers.discard(watcher)
            watcher.lines.put_nowait(None)
            return
        watcher.lines.put_nowait(line)

    def missed(self, since: int) -> list[str]:
        """The lines after a revision.

        Raises:
            RevisionGoneError: some of them are not in the buffer, or the revision lies in the future.
        """
        if since > self.revision:
            raise RevisionGoneError(f"revision {since} has not happened yet; the newest is {self.revision}")
        lines = [line for revision, line in self._events if revision > since]
        if len(lines) != self.revision - since:
            oldest = self._events[0][0] - 1 if self._events else self.revision
            raise RevisionGoneError(
                f"events after revision {since} are no longer kept, the oldest is {oldest}; list, then watch from there"
            )
        return lines

    def subscribe(self, first: Iterable[str], *, fine: bool) -> AsyncIterator[str]:
        """Listen: first the given lines, then what happens from now on."""
        watcher = Watcher(fine)
        for line in first:
            watcher.lines.put_nowait(line)
        if self._closed:
            watcher.lines.put_nowait(None)
        self._watchers.add(watcher)
        return self._stream(watcher)

    async def _stream(self, watcher: Watcher) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        heartbeat = loop.time() + HEARTBEAT_SECONDS
        try:
            while True:
                try:
                    line = await asyncio.wait_for(watcher.lines.get(), heartbeat - loop.time())
                except TimeoutError:
                    heartbeat = loop.time() + HEARTBEAT_SECONDS
                    if not watcher.fine:
                        continue
                    line = encode("HEARTBEAT", {"revision": self.revision})
                if line is None:
                    return
                yield line
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for watcher in self._watchers:
            watcher.lines.put_nowait(None)


def encode(kind: str, document: dict[str, Any]) -> str:
    """One line of the watch."""
    return json.dumps({"type": kind, "object": document}, separators=(",", ":")) + "\n"
