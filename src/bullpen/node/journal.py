"""The journal: what a new daemon must know of the instances that outlived the old one.

SQLite in the state directory, in WAL mode: safe against the end of the daemon at any instruction. Not synchronised to
the disk at each write, for what a loss of power would lose has died with the machine.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bullpen.core.instance import Instance
from bullpen.errors import StateError

SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (id TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (revision INTEGER PRIMARY KEY, line TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
SCHEMA_VERSION = 1
KEPT_EVENTS = 2000
TRIM_EVERY = 256


class Journal:
    """The journal of one state directory.

    Raises:
        StateError: the file cannot be opened or is of another version; the same for every method that writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._adapter: TypeAdapter[Instance] = TypeAdapter(Instance)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(SCHEMA)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise StateError(f"{path} is of version {version}, this Bullpen reads {SCHEMA_VERSION}; move it away")
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error as problem:
            raise self._error(problem) from problem
        path.chmod(0o600)

    def _error(self, problem: sqlite3.Error) -> StateError:
        return StateError(f"the journal {self._path} cannot be used: {problem}; make room, or give another --state-dir")

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(statement, values)
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
        """Every instance that was saved and not forgotten, oldest first."""
        rows = self._db.execute("SELECT data FROM instances").fetchall()
        return sorted((self._adapter.validate_json(data) for (data,) in rows), key=lambda instance: instance.created_at)

    def append_event(self, revision: int, line: str) -> None:
        """Keep an event for watchers that come back after a restart."""
        self._write("INSERT OR REPLACE INTO events VALUES (?, ?)", (revision, line))
        if revision % TRIM_EVERY == 0:
            self._write("DELETE FROM events WHERE revision <= ?", (revision - KEPT_EVENTS,))

    def events(self) -> list[tuple[int, str]]:
        """The kept events, oldest first."""
        return list(self._db.execute("SELECT revision, line FROM events ORDER BY revision"))

    def set_fact(self, name: str, value: Any) -> None:
        """Remember a value."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str, default: Any = None) -> Any:
        """A value that was remembered."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def close(self) -> None:
        """Write everything into one file and close it."""
        self._db.close()
