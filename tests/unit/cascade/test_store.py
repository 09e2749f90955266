# SPDX-License-Identifier: Apache-2.0
"""What every store does, in SQLite and in a real Redis server alike."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.cascade.conftest import OpenStore
from tests.unit.cascade.writer import answer
from vllm_spec_plugins.cascade.eviction import LEC, POLICIES, Bookkeeping
from vllm_spec_plugins.cascade.store import CacheError, Limits
from vllm_spec_plugins.cascade.store_redis import RedisStore
from vllm_spec_plugins.cascade.store_sqlite import SQLiteStore


def test_an_answer_comes_back_as_it_was_put_and_stays_when_the_store_is_closed(open_store: OpenStore) -> None:
    store, data = open_store(), bytes(range(256))
    assert store.get("key", 1.0) is None
    assert store.put("key", data, 2.0, 2.0)
    assert store.get("key", 3.0) == data
    store.close()
    assert open_store().get("key", 4.0) == data


def test_a_second_answer_replaces_the_first(open_store: OpenStore) -> None:
    store = open_store()
    store.put("key", b"first one", 1.0, 1.0, "g" * 64, b"vect")
    store.put("key", b"second", 1.0, 2.0)
    assert store.get("key", 3.0) == b"second"
    assert store.size() == (1, len(b"second"))
    assert store.vectors(0) == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("half_life", [20.0, math.inf])
def test_a_store_keeps_what_the_policy_says(open_store: OpenStore, policy: str, half_life: float, seed: int) -> None:
    """Request for request what `Bookkeeping` has, with a memory so small that it matters too."""
    rng = random.Random(seed)
    store = open_store(policy, half_life, entries=8, remembered=6)
    wanted = Bookkeeping(POLICIES[policy](half_life), entries=8, remembered=6)
    cost = [rng.choice([0.0, rng.lognormvariate(0, 1)]) for _ in range(40)]
    for now in range(1, 300):
        number = min(int(rng.paretovariate(0.7)) - 1, 39)
        key = f"key {number:02d}"
        here = wanted.get(key, now)
        assert (store.get(key, now) is not None) == here, (now, key)
        if not here or rng.random() < 0.1:
            assert store.put(key, key.encode(), cost[number], now) == wanted.put(key, cost[number], now), (now, key)
    assert store.size() == (8, 8 * len(b"key 00"))


def test_the_bytes_of_answers_and_vectors_stay_within_their_limit(open_store: OpenStore, seed: int) -> None:
    rng = random.Random(seed)
    store = open_store(entries=1000, size=2000)
    for now in range(200):
        vector = b"1234" if rng.random() < 0.5 else b""
        store.put(f"key {rng.randrange(60)}", b"x" * rng.randrange(1, 400), rng.random(), now, "g" * 64, vector)
        assert store.size()[1] <= 2000
    entries, size = store.size()
    assert entries > 5
    kept = [store.get(f"key {number}", 200.0) for number in range(60)]
    held = sum(len(data) for data in kept if data is not None) + sum(len(row.data) for row in store.vectors(0))
    assert (sum(data is not None for data in kept), held) == (entries, size)


def test_an_answer_larger_than_the_store_is_declined_and_displaces_nothing(open_store: OpenStore) -> None:
    store = open_store(size=100)
    store.put("small", b"x" * 90, 1.0, 1.0)
    assert not store.put("large", b"x" * 101, 1e9, 2.0)
    assert store.get("small", 3.0) is not None


def test_vectors_are_listed_from_a_revision_on_without_those_that_are_gone(open_store: OpenStore) -> None:
    store = open_store(entries=3)
    store.put("plain", b"x", 1.0, 1.0)
    store.put("a", b"x", 2.0, 1.0, "f" * 64, b"\0\1\2\3")
    store.put("b", b"x", 3.0, 1.0, "g" * 64, b"\4\5\6\7")
    first, second = store.vectors(0)
    assert (first.key, first.group, first.data) == ("a", "f" * 64, b"\0\1\2\3")
    assert (second.key, second.group, second.data) == ("b", "g" * 64, b"\4\5\6\7")
    assert store.vectors(first.revision) == [second]
    assert store.vectors(second.revision) == []
    store.put("c", b"x", 4.0, 1.0, "f" * 64, b"cccc")  # plain goes
    store.put("d", b"x", 5.0, 1.0, "f" * 64, b"dddd")  # a goes
    store.put("b", b"y", 3.0, 1.0, "g" * 64, b"bbbb")  # b is renewed
    assert [row.key for row in store.vectors(0)] == ["c", "d", "b"]
    assert store.vectors(0)[-1].revision > second.revision


def test_scores_of_another_policy_or_half_life_are_refused(open_store: OpenStore) -> None:
    open_store("lec", 100.0)
    with pytest.raises(
        CacheError, match=r"made with eviction=lec, half_life=100, not with eviction=lru, half_life=100;"
    ):
        open_store("lru", 100.0)
    with pytest.raises(CacheError, match=r"half_life=100, not with eviction=lec, half_life=inf;"):
        open_store("lec", math.inf)
    open_store("lec", 100.0, entries=3)


def test_two_that_opened_the_same_place_see_each_others_answers(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    one.put("key", b"x", 1.0, 1.0)
    assert other.get("key", 2.0) == b"x"
    other.put("key", b"y", 1.0, 3.0)
    assert one.get("key", 4.0) == b"y"


def test_threads_may_share_a_store(open_store: OpenStore) -> None:
    store = open_store(entries=1000)

    def work(thread: int) -> None:
        for number in range(25):
            store.put(f"{thread} {number}", b"x" * 10, 1.0, number)
            assert store.get(f"{thread} {number}", number) == b"x" * 10

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.size() == (200, 2000)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_several_processes_fill_one_store_at_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Three writers that open a new place in the same moment: every answer is there, none of another key."""
    place = request.getfixturevalue("redis_url") if kind == "redis" else str(tmp_path / "answers")
    command = [sys.executable, "-m", "tests.unit.cascade.writer", place]
    writers = [
        subprocess.Popen([*command, name, "60", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    for name, writer in zip("abc", writers, strict=True):
        output, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
        assert output.splitlines() == [f"{name} {number}" for number in range(60)]
    limits = Limits(1000, 1 << 30, 100)
    store = RedisStore(place, LEC(1e6), limits) if kind == "redis" else SQLiteStore(place, LEC(1e6), limits)
    assert all(
        store.get(f"{name} {number}", 99.0) == answer(f"{name} {number}") for name in "abc" for number in range(60)
    )
    assert store.size()[0] == 180
    store.close()
