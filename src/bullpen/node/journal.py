"""The journal: what a new daemon must know of the instances that outlived the old one.

SQLite in the state directory, in WAL mode: safe against the end of the daemon at any instruction. Not synchronised to
the disk at each write, for what a loss of power would lose has died with the machine.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bullpen.core.instance import Instance
from bullpen.core.profile import Profile
from bullpen.errors import StateError

SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (id TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (revision INTEGER PRIMARY KEY, line TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS profiles (key TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
SCHEMA_VERSION = 1
PROFILE: TypeAdapter[Profile] = TypeAdapter(Profile)
KEPT_EVENTS = 1000
CACHE_KIB = 256
"""Memory that SQLite may keep pages in. It reads back at a start alone; its default of 2 MiB would fill slowly."""
TRIM_EVERY = 256
CHECKPOINT_EVERY = 500
"""Writes."""


class Journal:
    """The journal of one state directory.

    Raises:
        StateError: the file cannot be opened or is of another version; the same for every method that writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._adapter: TypeAdapter[Instance] = TypeAdapter(Instance)
        self._writes = 0
        try:
            # It holds environments, and so secrets. What SQLite puts beside it gets the same mode.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
            self._db = self._connect()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                self._db.close()
                raise StateError(f"{path} is of version {version}, this Bullpen reads {SCHEMA_VERSION}; move it away")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except (sqlite3.Error, OSError) as problem:
            raise self._error(problem) from problem

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        db.execute("PRAGMA wal_autocheckpoint = 0")  # it would wait for the disk; see `checkpoint`
        return db

    def _error(self, problem: Exception) -> StateError:
        if isinstance(problem, sqlite3.DatabaseError) and not isinstance(problem, sqlite3.OperationalError):
            return StateError(f"the journal {self._path} is damaged: {problem}; move it away")
        return StateError(f"the journal {self._path} cannot be used: {problem}; make room, or give another --state-dir")

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as problem:
            raise self._error(problem) from problem
        self._writes += 1

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as problem:
            raise self._error(problem) from problem

    def save(self, instance: Instance) -> None:
        """Write an instance, new or changed."""
        data = self._adapter.dump_json(instance).decode()
        self._write(
            "INSERT INTO instances VALUES (?, ?) ON CONFLICT DO UPDATE SET data = excluded.data", (instance.id, data)
        )

    def forget(self, instance_id: str) -> None:
        """Remove an instance."""
        self._write("DELETE FROM instances WHERE id = ?", (instance_id,))

    def instances(self) -> list[Instance]:
        """Every instance that was saved and not forgotten, oldest first.

        Raises:
            StateError: one cannot be read.
        """
        try:
            saved = [self._adapter.validate_json(data) for (data,) in self._read("SELECT data FROM instances")]
        except ValidationError as problem:
            raise StateError(
                f"the journal {self._path} holds an instance that this Bullpen cannot read"
                f" ({problem.error_count()} errors); move it away"
            ) from None
        return sorted(saved, key=lambda instance: instance.created_at)

    def save_profile(self, key: str, profile: Profile) -> None:
        """Write what is remembered of a model."""
        data = PROFILE.dump_json(profile).decode()
        self._write("INSERT OR REPLACE INTO profiles VALUES (?, ?)", (key, data))

    def profiles(self) -> dict[str, Profile]:
        """All that is remembered of models; what this Bullpen cannot read is forgotten, for it is measured again."""
        known = {}
        for key, data in self._read("SELECT key, data FROM profiles"):
            with suppress(ValidationError):
                known[key] = PROFILE.validate_json(data)
        return known

    def append_event(self, revision: int, line: str) -> None:
        """Keep an event for watchers that come back after a restart."""
        self._write("INSERT OR REPLACE INTO events VALUES (?, ?)", (revision, line))
        if revision % TRIM_EVERY == 0:
            self._write("DELETE FROM events WHERE revision <= ?", (revision - KEPT_EVENTS,))

    def events(self) -> list[tuple[int, str]]:
        """The kept events, oldest first."""
        rows = self._read("SELECT revision, line FROM events ORDER BY revision")
        return [(revision, line) for revision, line in rows]

    def set_fact(self, name: str, value: Any) -> None:
        """Remember a value."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str, default: Any = None) -> Any:
        """A value that was remembered."""
        rows = self._read("SELECT value FROM facts WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else default

    def is_due(self) -> bool:
        """Whether so much was written that `checkpoint` is worth its while."""
        return self._writes >= CHECKPOINT_EVERY

    def checkpoint(self) -> None:
        """Move what was written from the log into the database, which waits for the disk: call it in a thread."""
        self._writes = 0
        with suppress(sqlite3.Error), closing(self._connect()) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Write everything into one file and close it."""
        self._db.close()
