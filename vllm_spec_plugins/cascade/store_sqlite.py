# SPDX-License-Identifier: Apache-2.0
"""Answers in one SQLite file: the default. Routers on one machine may share it.

Write-ahead log with synchronous=NORMAL: a transaction that has returned is in the operating system's hands, so it survives the
death of the process, `kill -9` included, and the file is whole after a loss of power too. What NORMAL can lose then are the last
transactions, which FULL would save at the price of a disk flush per request: an answer lost is an answer made again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_spec_plugins.cascade.eviction import NEVER, Policy
from vllm_spec_plugins.cascade.store import CacheError, Limits, Vector

APPLICATION = 0x76737063  # marks the file as ours: "vspc"
VERSION = 1
NEEDED = (3, 35)  # RETURNING
BUSY = 10.0  # seconds to wait for another process's transaction

SCHEMA = """
CREATE TABLE entry (
    key TEXT PRIMARY KEY, data BLOB NOT NULL, cost REAL NOT NULL, weight REAL NOT NULL, score REAL NOT NULL,
    revision INTEGER NOT NULL, grp TEXT NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX entry_score ON entry (score, key);
CREATE INDEX entry_revision ON entry (revision) WHERE vector != x'';
CREATE TABLE seen (key TEXT PRIMARY KEY, weight REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX seen_weight ON seen (weight, key);
CREATE TABLE total (entries INTEGER NOT NULL, bytes INTEGER NOT NULL, seen INTEGER NOT NULL, revision INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0, 0, 0);
CREATE TABLE policy (name TEXT NOT NULL, half_life REAL NOT NULL);
"""


class SQLiteStore:
    """See `Store`. The file is made, readable by its owner alone, where it does not exist.

    One connection behind one lock: writers wait for each other in SQLite anyway. Open it after forking.

    Raises CacheError for a file that is not ours, of another version, or made with another policy.
    """

    def __init__(self, path: str | Path, policy: Policy, limits: Limits) -> None:
        self.path, self.policy, self.limits = Path(path), policy, limits
        self._lock, self._process = threading.Lock(), os.getpid()
        if sqlite3.sqlite_version_info < NEEDED:
            raise CacheError(f"the answer cache needs SQLite 3.35, and this Python has {sqlite3.sqlite_version}")
        try:
            # SQLite gives the log and the shared memory beside it the same mode.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY, isolation_level=None, check_same_thread=False, cached_statements=64
            )
        except (OSError, sqlite3.Error) as error:
            raise CacheError(f"the answer cache {self.path} cannot be opened: {error}") from error
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        # Two processes that open a new file at once: one finds it locked while the other turns the log on, without waiting.
        deadline = time.monotonic() + BUSY
        while True:
            try:
                (mode,) = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise CacheError(f"the answer cache {self.path} cannot be opened: {error}") from error
                time.sleep(0.01)
            except sqlite3.DatabaseError as error:
                raise CacheError(f"the answer cache {self.path} cannot be opened: {error}") from error
        if mode != "wal":
            raise CacheError(f"the answer cache {self.path} lies where SQLite has no write-ahead log; use a local disk")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        with self._transaction() as sql:
            (application,) = sql.execute("PRAGMA application_id").fetchone()
            (version,) = sql.execute("PRAGMA user_version").fetchone()
            (tables,) = sql.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables == 0:
                for statement in SCHEMA.split(";"):
                    sql.execute(statement)
                sql.execute("INSERT INTO policy VALUES (?, ?)", (self.policy.name, self.policy.half_life))
                sql.execute(f"PRAGMA application_id={APPLICATION}")
                sql.execute(f"PRAGMA user_version={VERSION}")
            elif application != APPLICATION:
                raise CacheError(f"{self.path} is a database of another program; name another file")
            elif version != VERSION:
                raise CacheError(
                    f"the answer cache {self.path} has version {version}, and this program reads {VERSION}; "
                    f"name another file or remove it"
                )
            name, half_life = sql.execute("SELECT name, half_life FROM policy").fetchone()
            check_policy(str(self.path), self.policy, name, half_life)

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """IMMEDIATE: what is read is still true when it is written. What only reads keeps nobody waiting with a plain BEGIN."""
        if os.getpid() != self._process:
            raise CacheError(f"the answer cache {self.path} was opened before this process was forked; open it after")
        try:
            with self._lock:
                self._connection.execute(begin)
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise CacheError(f"the answer cache {self.path} does not answer: {error}") from error

    def get(self, key: str, now: float) -> bytes | None:
        with self._transaction() as sql:
            row = sql.execute("SELECT data, cost, weight FROM entry WHERE key = ?", (key,)).fetchone()
            if row is None:
                known = sql.execute("SELECT weight FROM seen WHERE key = ?", (key,)).fetchone()
                self._remember(sql, key, self.policy.weigh(known[0] if known else NEVER, now))
                return None
            data, cost, weight = row
            weight = self.policy.weigh(weight, now)
            score = self.policy.score(weight, cost, now)
            sql.execute("UPDATE entry SET weight = ?, score = ? WHERE key = ?", (weight, score, key))
            return data

    def put(self, key: str, data: bytes, cost: float, now: float, group: str = "", vector: bytes = b"") -> bool:
        size = len(data) + len(vector)
        if size > self.limits.bytes:
            return False
        with self._transaction() as sql:
            old = sql.execute(
                "SELECT weight, length(data) + length(vector) FROM entry WHERE key = ?", (key,)
            ).fetchone()
            if old is None:
                known = sql.execute("DELETE FROM seen WHERE key = ? RETURNING weight", (key,)).fetchall()
                weight = known[0][0] if known else self.policy.weigh(NEVER, now)
                sql.execute("UPDATE total SET seen = seen - ?", (len(known),))
            else:
                weight = old[0]
            sql.execute(
                "UPDATE total SET entries = entries + ?, bytes = bytes + ?, revision = revision + 1",
                (int(old is None), size - (old[1] if old else 0)),
            )
            sql.execute(
                "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?, (SELECT revision FROM total), ?, ?)",
                (key, data, cost, weight, self.policy.score(weight, cost, now), group, vector),
            )
            return self._evict(sql, key)

    def _evict(self, sql: sqlite3.Connection, new: str) -> bool:
        """Drop the least until the limits hold; whether `new` stayed."""
        entries, size = sql.execute("SELECT entries, bytes FROM total").fetchone()
        kept = True
        while entries > self.limits.entries or size > self.limits.bytes:
            ((key, weight, freed),) = sql.execute(
                "DELETE FROM entry WHERE key = (SELECT key FROM entry ORDER BY score, key LIMIT 1) "
                "RETURNING key, weight, length(data) + length(vector)"
            ).fetchall()
            entries, size, kept = entries - 1, size - freed, kept and key != new
            sql.execute("UPDATE total SET entries = ?, bytes = ?", (entries, size))
            self._remember(sql, key, weight)
        return kept

    def _remember(self, sql: sqlite3.Connection, key: str, weight: float) -> None:
        updated = sql.execute("UPDATE seen SET weight = ? WHERE key = ?", (weight, key)).rowcount
        if updated:
            return
        sql.execute("INSERT INTO seen VALUES (?, ?)", (key, weight))
        (seen,) = sql.execute("SELECT seen FROM total").fetchone()
        excess = max(0, seen + 1 - self.limits.remembered)
        if excess:
            sql.execute("DELETE FROM seen WHERE key IN (SELECT key FROM seen ORDER BY weight, key LIMIT ?)", (excess,))
        sql.execute("UPDATE total SET seen = ?", (seen + 1 - excess,))

    def vectors(self, after: int) -> list[Vector]:
        with self._transaction("BEGIN") as sql:
            rows = sql.execute(
                "SELECT revision, key, grp, vector FROM entry WHERE vector != x'' AND revision > ? ORDER BY revision",
                (after,),
            ).fetchall()
        return [Vector(*row) for row in rows]

    def size(self) -> tuple[int, int]:
        with self._transaction("BEGIN") as sql:
            entries, size = sql.execute("SELECT entries, bytes FROM total").fetchone()
        return entries, size

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def check_policy(where: str, policy: Policy, name: str, half_life: float) -> None:
    """Scores of two policies, or of two half-lives, cannot be compared. Raises CacheError."""
    if (name, half_life) != (policy.name, policy.half_life):
        raise CacheError(
            f"the answer cache {where} was made with eviction={name}, half_life={half_life:g}, not with "
            f"eviction={policy.name}, half_life={policy.half_life:g}; use the first, or another place"
        )
