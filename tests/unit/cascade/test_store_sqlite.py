# SPDX-License-Identifier: Apache-2.0
"""The SQLite file: what survives, who may read it, what is refused."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cascade.writer import answer
from vllm_spec_plugins.cascade.eviction import LEC
from vllm_spec_plugins.cascade.store import CacheError, Limits
from vllm_spec_plugins.cascade.store_sqlite import SQLiteStore

LIMITS = Limits(100, 1 << 20, 100)


def open_it(path: Path) -> SQLiteStore:
    return SQLiteStore(path, LEC(1e6), LIMITS)


@pytest.mark.parametrize("entries", [100_000, 40])
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, seed: int, entries: int) -> None:
    """With room for all, and with an eviction in every transaction."""
    path = tmp_path / "answers"
    command = [sys.executable, "-m", "tests.unit.cascade.writer", str(path), "w", "1000000", str(entries)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(random.Random(seed).randrange(200, 500))]
        writer.kill()
        said += writer.stdout.readlines()
    acknowledged = [line.strip() for line in said if line.endswith("\n")]
    assert len(acknowledged) >= 200

    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        entries_there, size = database.execute(
            "SELECT count(*), sum(length(data) + length(vector)) FROM entry"
        ).fetchone()
        assert database.execute("SELECT entries, bytes FROM total").fetchone() == (entries_there, size)
        assert (
            database.execute("SELECT seen FROM total").fetchone()
            == database.execute("SELECT count(*) FROM seen").fetchone()
        )
    database.close()
    store = open_it(path)
    # Costs rise, so the last ones stay; one more may have been put without being acknowledged.
    for key in acknowledged[-(entries - 1) :]:
        assert store.get(key, 1e6) == answer(key)
    assert entries_there <= entries
    store.close()


def test_only_its_owner_may_read_the_file_and_the_log(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = open_it(tmp_path / "answers")
        store.put("key", b"x", 1.0, 1.0)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("answers", "answers-wal", "answers-shm"), 0o600)
    store.close()


def test_the_file_stops_growing_when_the_cache_is_full(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    store = SQLiteStore(path, LEC(1e6), Limits(50, 1 << 30, 50))

    def fill(start: int) -> int:
        for number in range(start, start + 300):
            store.put(f"key {number:09}", b"x" * 2000, 1.0, number * 10.0)
        assert store.size()[0] == 50
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        return pages

    assert fill(300) <= fill(0) + 8
    store.close()


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (a)")
    database.close()
    with pytest.raises(CacheError, match=r"other is a database of another program; name another file"):
        open_it(path)


def test_a_file_that_is_no_database_or_cannot_be_made_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("not a database, but long enough to look at " * 100)
    with pytest.raises(CacheError, match=r"cache .*text cannot be opened: file is not a database"):
        open_it(path)
    with pytest.raises(CacheError, match=r"no-folder/answers cannot be opened: .*No such file"):
        open_it(tmp_path / "no-folder" / "answers")


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    open_it(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=2")
    database.close()
    with pytest.raises(CacheError, match=r"has version 2, and this program reads 1"):
        open_it(path)


def test_a_store_that_was_opened_before_a_fork_is_not_used_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_it(tmp_path / "answers")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(CacheError, match=r"before this process was forked"):
        store.get("key", 1.0)
    monkeypatch.undo()
    store.close()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_it(tmp_path / "answers")
    store.close()
    with pytest.raises(CacheError, match=r"does not answer: .*closed"):
        store.get("key", 1.0)
