"""Logs of instances: one file each, opened for append by the whole process tree, read by byte ranges.

A cap frees the oldest bytes with ``fallocate`` (a hole is punched at the head of the file). The tree goes on writing to
the same open file, offsets stay what they were and nothing new can be lost, which no rotation by copy or rename gives.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from bullpen.errors import LaunchError
from bullpen.node.characters import BEGUN, LONGEST_CHARACTER, owed, whole_characters

MAX_CHUNK = 1024 * 1024
"""Bytes of one read at most."""
FOLLOW_SECONDS = 0.2
SHORT_KEY = 8
"""Characters of a key that tell instances of the same id apart, one after the other."""
HOLE_BLOCK = 1024 * 1024
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


@dataclass(frozen=True)
class Chunk:
    """Bytes of a log: ``start`` of the first one, ``total`` bytes ever written."""

    data: bytes
    start: int
    total: int


@dataclass(frozen=True)
class Piece:
    """A piece of a log that begins and ends between characters.

    Attributes:
        offset: its first byte.
        data: its bytes.
    """

    offset: int
    data: bytes

    @property
    def next_offset(self) -> int:
        """The first byte after it."""
        return self.offset + len(self.data)

    @property
    def content(self) -> str:
        """Its text; what is none is replaced."""
        return self.data.decode("utf-8", "replace")


class Logs:
    """The logs of one state directory.

    Args:
        folder: where they lie, or a link to each that lies elsewhere. So all are found wherever an earlier daemon was
            told to put them.
        cap: bytes of a log that are kept on disk; 0 keeps all.
        place: where new ones are put; None for `folder`.
    """

    def __init__(self, folder: Path, cap: int, place: Path | None = None) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder.resolve()  # as the kernel names it, which is how processes that write there are told
        self._place = place.resolve() if place is not None else self._folder
        self._cap = cap
        self._dropped: dict[str, int] = {}

    def path(self, key: str) -> Path:
        """The log of the instance with that key, where it lies."""
        entry = self._entry(key)
        try:
            return Path(os.readlink(entry))
        except OSError:
            return entry

    def _entry(self, key: str) -> Path:
        return self._folder / f"{key}.log"

    def create(self, key: str, name: str) -> int:
        """Create a log and return a descriptor that appends to it.

        Args:
            key: the instance's.
            name: its id, which a file begins with that lies in a folder of somebody's choice: people look for it there.

        Raises:
            LaunchError: it cannot be created.
        """
        entry = self._entry(key)
        try:
            if self._place != self._folder and not os.path.lexists(entry):
                entry.symlink_to(self._place / f"{name}-{key[:SHORT_KEY]}.log")
            return os.open(entry, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise LaunchError(
                f"no log can be written below {self.path(key).parent}: {problem.strerror}; make room there"
            ) from problem

    def remove(self, key: str) -> None:
        """Remove a log."""
        self._dropped.pop(key, None)
        self.path(key).unlink(missing_ok=True)
        self._entry(key).unlink(missing_ok=True)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Chunk:
        """Read bytes from ``start`` up to and not including ``end``, `MAX_CHUNK` at most.

        Where the oldest bytes are gone, reading begins with the first one kept.
        """
        try:
            descriptor = os.open(self._entry(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Chunk(b"", 0, 0)
        try:
            total = os.fstat(descriptor).st_size
            first = min(max(start, self._first_kept(key, descriptor)), total)
            last = total if end is None else min(end, total)
            return Chunk(os.pread(descriptor, max(0, min(last - first, MAX_CHUNK)), first), first, total)
        finally:
            os.close(descriptor)

    def tail(self, key: str, size: int, since: int = 0) -> bytes:
        """The last bytes of a log, none of those before ``since``."""
        total = self.read(key, 0, 0).total
        return self.read(key, max(since, total - size)).data

    async def follow(self, key: str, start: int, ended: Callable[[], bool]) -> AsyncIterator[bytes]:
        """What is and will be in the log from ``start`` on, until ``ended`` says so and all of it was read."""
        position = start
        while True:
            last_round = ended()
            chunk = self.read(key, position)
            if chunk.data:
                position = chunk.start + len(chunk.data)
                yield chunk.data
            elif last_round:
                return
            else:
                await asyncio.sleep(FOLLOW_SECONDS)

    def _first_kept(self, key: str, descriptor: int) -> int:
        """Where what is left of a log begins; an earlier daemon may have dropped what was before."""
        if key not in self._dropped:
            try:
                self._dropped[key] = os.lseek(descriptor, 0, os.SEEK_DATA) if self._cap else 0
            except OSError:  # an empty log, or a file system that keeps no account of holes
                return 0
        return self._dropped[key]

    def enforce_cap(self, key: str) -> None:
        """Free the oldest bytes of a log that has grown beyond the cap. Where the file system cannot, do nothing."""
        if not self._cap:
            return
        try:
            descriptor = os.open(self._entry(key), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return
        try:
            total = os.fstat(descriptor).st_size
            dropped = self._first_kept(key, descriptor)
            surplus = (total - dropped - self._cap) // HOLE_BLOCK * HOLE_BLOCK
            if surplus > 0 and punch_hole(descriptor, dropped + surplus):
                self._dropped[key] = dropped + surplus
        finally:
            os.close(descriptor)


def read_piece(read: Callable[[int, int], Chunk], offset: int, size: int, *, is_whole: bool) -> Piece:
    """Read a piece of a log, cut between characters.

    Args:
        read: reads bytes of the log, from one offset up to another.
        offset: where it begins. What lies beyond the end is the end; what the cap has dropped is passed over.
        size: bytes at most, `LEAST_PIECE` at least.
        is_whole: nothing more is going to be written, so that a character that is not all there never will be.
    """
    chunk = read(offset, offset + size)
    if chunk.start > offset:  # the end that was asked for may lie in what was dropped
        chunk = read(chunk.start, chunk.start + size)
    first = max(0, chunk.start - LONGEST_CHARACTER + 1)
    before = read(first, chunk.start)
    was_dropped = before.start > first
    data = chunk.data[owed(BEGUN + before.data if was_dropped else before.data, chunk.data) :]
    start = chunk.start + len(chunk.data) - len(data)
    if not (is_whole and start + len(data) == chunk.total):
        data = whole_characters(data)
    return Piece(start, data)


def punch_hole(descriptor: int, length: int) -> bool:
    """Give the first ``length`` bytes of a file back to the file system; say whether it could."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    return bool(fallocate(descriptor, mode, ctypes.c_int64(0), ctypes.c_int64(length)) == 0)
