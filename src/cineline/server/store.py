"""The jobs, in SQLite: what is committed here survives any end of the process.

A job is `queued`, `in_progress` (the engine has it), `completed` (its file is there) or `failed`; deleted ones have no
row. Each change of a state is one statement that names the state before, so that of two who race one wins.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cineline.errors import InvalidConfig, OutputError, reason, shown
from cineline.server.fair import Waiting

State = Literal["queued", "in_progress", "completed", "failed"]
OPEN: tuple[State, ...] = ("queued", "in_progress")

VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    priority TEXT NOT NULL,
    work REAL NOT NULL,
    request TEXT NOT NULL,
    images TEXT NOT NULL,
    said TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    expires_at REAL,
    nbytes INTEGER NOT NULL DEFAULT 0,
    setbacks INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, number);
CREATE INDEX IF NOT EXISTS by_end ON jobs (owner, completed_at);
CREATE INDEX IF NOT EXISTS by_expiry ON jobs (expires_at);
"""


@dataclass(frozen=True)
class StoredJob:
    """A row.

    Attributes:
        number: in order of creation. owner: whose key made it; empty where there are no keys.
        work: what it takes, in a unit of `orders`. request: fields of a `VideoRequest`, without the images.
        images: the names of those that it has.
        said: what answers repeat of it.
        idempotency_key, fingerprint: of the client's request, where it gave a key.
        created_at, started_at, completed_at, expires_at: seconds since 1970.
        nbytes: of the video. setbacks: how often it was begun anew for a fault that may be its own.
    """

    number: int
    id: str
    owner: str
    state: State
    priority: str
    work: float
    request: Mapping[str, Any]
    images: Sequence[str]
    said: Mapping[str, Any]
    idempotency_key: str | None
    fingerprint: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    nbytes: int
    setbacks: int
    error_code: str | None
    error_message: str | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> StoredJob:
        """From the database."""
        values = dict(row)
        return cls(**values | {name: json.loads(values[name]) for name in ("request", "images", "said")})


@dataclass(frozen=True)
class NewJob:
    """What a row is made of."""

    id: str
    owner: str
    priority: str
    work: float
    request: Mapping[str, Any]
    images: Sequence[str]
    said: Mapping[str, Any]
    idempotency_key: str | None = None
    fingerprint: str | None = None


class Store:
    """A database of jobs; for any thread. Readers do not wait for who writes.

    Attributes:
        changes: counted so far; who asks for it first and for jobs then has none that are older.

    Raises:
        OutputError: it cannot be opened. InvalidConfig: it is another version's.
    """

    def __init__(self, path: Path) -> None:
        self.changes = 0
        try:
            self._writer, self._reader = _connected(path), _connected(path)
            self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise InvalidConfig(f"{shown(path)} is of version {version}, not {VERSION}: give another folder.")
            self._writer.executescript(SCHEMA)
            self._writer.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise OutputError(f"{shown(path)} cannot be used ({reason(error)}): check the disk and the file.") from None

    def of_model(self, model: str) -> None:
        """The jobs are made by this one.

        Raises:
            InvalidConfig: jobs of another are not done.
        """
        before = self._ask("SELECT value FROM facts WHERE name = 'model'")
        open_jobs = sum(self.counts()[state] for state in OPEN)
        if before and before[0][0] != model and open_jobs:
            raise InvalidConfig(
                f"{open_jobs} jobs are not done that were taken for {shown(before[0][0])}: serve that, not "
                f"{shown(model)}, until they are, or give another --data-dir."
            )
        self._change("INSERT OR REPLACE INTO facts VALUES ('model', ?)", (model,))

    def close(self) -> None:
        """After which nothing is asked any more."""
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()

    def _change(self, statement: str, values: Sequence[Any]) -> int:
        """How many rows it changed; they are on the disk."""
        with self._write_lock:
            changed = self._writer.execute(statement, values).rowcount
            self.changes += 1
            return changed

    def _ask(self, question: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._read_lock, closing(self._reader.execute(question, values)) as cursor:
            return cursor.fetchall()

    def add(self, new: NewJob) -> None:
        """Queue a job.

        Raises:
            sqlite3.IntegrityError: the owner has a job with that idempotency key.
        """
        self._change(
            "INSERT INTO jobs (id, owner, state, priority, work, request, images, said, idempotency_key, "
            "fingerprint, created_at) VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(new.id, new.owner, new.priority, new.work, json.dumps(dict(new.request)), json.dumps(new.images)),
                *(json.dumps(dict(new.said)), new.idempotency_key, new.fingerprint, time.time()),
            ),
        )

    def get(self, job: str) -> StoredJob | None:
        """By its id."""
        return next(map(StoredJob.of, self._ask("SELECT * FROM jobs WHERE id = ?", (job,))), None)

    def by_key(self, owner: str, key: str) -> StoredJob | None:
        """By its owner's idempotency key."""
        rows = self._ask("SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?", (owner, key))
        return next(map(StoredJob.of, rows), None)

    def page(self, owner: str, after: int | None, limit: int, ascending: bool) -> list[StoredJob]:
        """An owner's jobs by number, behind that one."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        behind = f"AND number {sign} ?" if after is not None else ""
        values = [owner, *([after] if after is not None else []), limit]
        question = f"SELECT * FROM jobs WHERE owner = ? {behind} ORDER BY number {order} LIMIT ?"
        return list(map(StoredJob.of, self._ask(question, values)))

    def in_state(self, *states: State) -> list[StoredJob]:
        """All jobs in one of these states, in order."""
        marks = ", ".join("?" * len(states))
        question = f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY number"
        return list(map(StoredJob.of, self._ask(question, states)))

    def open_of(self, owner: str) -> list[StoredJob]:
        """An owner's jobs that wait or run, in order."""
        question = "SELECT * FROM jobs WHERE owner = ? AND state IN (?, ?) ORDER BY number"
        return list(map(StoredJob.of, self._ask(question, (owner, *OPEN))))

    def ended_since(self, owner: str, moment: float) -> list[StoredJob]:
        """An owner's jobs that ended then or later, in order."""
        question = "SELECT * FROM jobs WHERE owner = ? AND completed_at >= ? ORDER BY completed_at, number"
        return list(map(StoredJob.of, self._ask(question, (owner, moment))))

    def waiting(self) -> list[Waiting]:
        """What is queued, in order, as far as its turn depends on it."""
        rows = self._ask("SELECT id, owner, priority, work FROM jobs WHERE state = 'queued' ORDER BY number")
        return [Waiting(*row) for row in rows]

    def counts(self, owner: str | None = None) -> dict[State, int]:
        """Jobs by state, of all owners or of one."""
        only, values = ("", ()) if owner is None else ("WHERE owner = ?", (owner,))
        found = dict(map(tuple, self._ask(f"SELECT state, COUNT(*) FROM jobs {only} GROUP BY state", values)))
        return {state: found.get(state, 0) for state in (*OPEN, "completed", "failed")}

    def start(self, job: str) -> bool:
        """The engine is to have it."""
        return (
            self._change(
                "UPDATE jobs SET state = 'in_progress', started_at = ? WHERE id = ? AND state = 'queued'",
                (time.time(), job),
            )
            == 1
        )

    def queue_again(self, job: str, setback: bool = False) -> bool:
        """It begins anew, in its old place."""
        return (
            self._change(
                "UPDATE jobs SET state = 'queued', started_at = NULL, setbacks = setbacks + ? "
                "WHERE id = ? AND state = 'in_progress'",
                (int(setback), job),
            )
            == 1
        )

    def set_back(self, job: str) -> None:
        """It stays with the engine, but what ended that may have been its own."""
        self._change("UPDATE jobs SET setbacks = setbacks + 1 WHERE id = ? AND state = 'in_progress'", (job,))

    def complete(self, job: str, nbytes: int, keep_s: float) -> bool:
        """Its file is there; false where it is the engine's no more."""
        return (
            self._change(
                "UPDATE jobs SET state = 'completed', completed_at = ?, expires_at = ?, nbytes = ? "
                "WHERE id = ? AND state = 'in_progress'",
                (time.time(), time.time() + keep_s, nbytes, job),
            )
            == 1
        )

    def fail(self, job: str, code: str, message: str, keep_s: float) -> bool:
        """It will never be."""
        return (
            self._change(
                "UPDATE jobs SET state = 'failed', completed_at = ?, expires_at = ?, error_code = ?, error_message = ? "
                "WHERE id = ? AND state IN ('queued', 'in_progress')",
                (time.time(), time.time() + keep_s, code, message, job),
            )
            == 1
        )

    def remove(self, job: str) -> bool:
        """It is gone."""
        return self._change("DELETE FROM jobs WHERE id = ?", (job,)) == 1

    def expired(self, keep_bytes: float) -> list[str]:
        """Finished jobs whose time is over, and the oldest of those whose videos take more than that together; the
        newest stays, however large."""
        late = [row[0] for row in self._ask("SELECT id FROM jobs WHERE expires_at < ?", (time.time(),))]
        over = self._ask(
            "SELECT id FROM (SELECT id, SUM(nbytes) OVER (ORDER BY completed_at DESC, number DESC) AS taken, "
            "ROW_NUMBER() OVER (ORDER BY completed_at DESC, number DESC) AS place FROM jobs WHERE state = 'completed') "
            "WHERE taken > ? AND place > 1",
            (keep_bytes,),
        )
        return list(dict.fromkeys([*late, *(row[0] for row in over)]))


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 10000"):
        connection.execute(f"PRAGMA {pragma}")
    return connection
