# SPDX-License-Identifier: Apache-2.0
"""The cache as a router uses it: tenants, ages, costs, restarts, in SQLite and in Redis."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.cascade.cache import Answer, Cache, CacheError, CacheSettings, Stats, open_cache

OpenCache = Callable[..., Cache]

REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "why?"}], "temperature": 0}
ANSWER = Answer(
    {"choices": [{"message": {"content": "because – ü"}}]}, {"prompt_tokens": 3, "completion_tokens": 2}, 0.5
)


class Clock:
    """A clock that stands still."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[OpenCache]:
    """Opens the same place every time, with further settings."""
    place = request.getfixturevalue("redis_url") if request.param == "redis" else str(tmp_path / "answers")
    made: list[Cache] = []

    def make(**given: Any) -> Cache:
        made.append(open_cache(CacheSettings.parse({"store": place, **given}), clock=clock))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def test_the_same_question_gets_the_answer_that_was_put(opened: OpenCache, clock: Clock) -> None:
    cache = opened()
    key = cache.key(REQUEST, "a")
    assert cache.get(key) is None
    assert cache.put(key, ANSWER)
    found = cache.get(cache.key({**REQUEST, "stream": True}, "a"))
    assert found == Answer(ANSWER.payload, ANSWER.usage, 0.5, created=clock.now)


def test_the_same_prompt_under_two_api_keys_is_no_hit(opened: OpenCache) -> None:
    cache = opened()
    cache.put(cache.key(REQUEST, "a"), ANSWER)
    assert cache.get(cache.key(REQUEST, "b")) is None
    assert cache.get(cache.key(REQUEST, None)) is None
    assert cache.get(cache.key(REQUEST, "a")) is not None


def test_clients_of_a_shared_name_have_one_cache_and_no_other(opened: OpenCache) -> None:
    alone, team, other = opened(), opened(shared="team"), opened(shared="other")
    team.put(team.key(REQUEST, "a"), ANSWER)
    assert team.get(team.key(REQUEST, "b")) is not None
    assert alone.get(alone.key(REQUEST, "a")) is None
    assert other.get(other.key(REQUEST, "a")) is None


def test_another_version_does_not_find_the_answers_of_the_old_one(opened: OpenCache) -> None:
    old, new = opened(), opened(version="weights of May")
    old.put(old.key(REQUEST, "a"), ANSWER)
    assert new.get(new.key(REQUEST, "a")) is None
    new.put(new.key(REQUEST, "a"), ANSWER)
    assert new.get(new.key(REQUEST, "a")) is not None


def test_an_answer_that_is_too_old_is_not_given(opened: OpenCache, clock: Clock) -> None:
    cache = opened(max_age=100)
    key = cache.key(REQUEST, "a")
    cache.put(key, ANSWER)
    clock.now += 90
    assert cache.get(key) is not None
    assert cache.get(key, max_age=80) is None
    clock.now += 20
    assert cache.get(key) is None
    cache.put(key, ANSWER)
    assert cache.get(key) is not None


def test_a_full_cache_keeps_what_is_asked_for_often_and_costs_much(opened: OpenCache) -> None:
    cache = opened(max_entries=2)
    keys = [cache.key({**REQUEST, "max_tokens": number}, "a") for number in range(3)]
    for _ in range(9):
        cache.get(keys[0])
    assert cache.put(keys[0], ANSWER)  # often, cheap
    assert cache.put(keys[1], ANSWER, cost=100.0)  # once, dear
    assert not cache.put(keys[2], ANSWER)
    assert [cache.get(key) is not None for key in keys] == [True, True, False]
    assert cache.get(keys[1]) == Answer(ANSWER.payload, ANSWER.usage, 100.0, created=cache._clock())


def test_statistics_count_what_happened_and_what_it_saved(opened: OpenCache) -> None:
    cache = opened(max_entries=1)
    key, other = cache.key(REQUEST, "a"), cache.key(REQUEST, "b")
    cache.get(key)
    cache.put(key, ANSWER)
    cache.get(key)
    cache.get(key)
    cache.put(other, ANSWER)
    stats = cache.stats()
    assert stats.bytes > 100
    stats.bytes = 0
    assert stats == Stats(hits=2, misses=1, puts=1, declined=1, saved=1.0, entries=1)


def test_answers_survive_a_restart(opened: OpenCache) -> None:
    cache = opened()
    cache.put(cache.key(REQUEST, "a"), ANSWER)
    cache.close()
    again = opened()
    assert again.get(again.key(REQUEST, "a")) is not None


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_a_cost_that_cannot_be_compared_is_refused(opened: OpenCache, cost: float) -> None:
    cache = opened()
    with pytest.raises(ValueError, match=r"cost is a finite number"):
        cache.put(cache.key(REQUEST, "a"), ANSWER, cost)


def test_an_answer_that_json_cannot_carry_is_refused(opened: OpenCache) -> None:
    cache = opened()
    with pytest.raises(ValueError, match=r"not JSON"):
        cache.put(cache.key(REQUEST, "a"), Answer({"a": {1, 2}}, {}, 1.0))


def test_many_requests_at_once_through_threads_of_an_event_loop(opened: OpenCache) -> None:
    cache = opened()

    async def one(number: int) -> bool:
        key = cache.key({**REQUEST, "max_tokens": number % 10}, "a")
        found = await asyncio.to_thread(cache.get, key)
        if found is None:
            await asyncio.to_thread(cache.put, key, Answer({"number": number % 10}, {}, 1.0))
        return found is None or found.payload == {"number": number % 10}

    async def everything() -> list[bool]:
        return await asyncio.gather(*(one(number) for number in range(100)))

    assert all(asyncio.run(everything()))
    stats = cache.stats()
    assert (stats.hits + stats.misses, stats.entries) == (100, 10)


def test_use_follows_the_settings(opened: OpenCache) -> None:
    sampled = {**REQUEST, "temperature": 1}
    assert not opened().use(sampled).read
    assert opened(sampled=True).use(sampled).read
    assert not opened().use(REQUEST, {"Cache-Control": "no-cache"}).read


def test_a_store_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cannot be opened"):
        open_cache(CacheSettings.parse({"store": str(tmp_path)}))
