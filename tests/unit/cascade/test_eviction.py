# SPDX-License-Identifier: Apache-2.0
"""Policies as their definition has them, and what they are worth on Zipf traffic."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from vllm_spec_plugins.cascade.eviction import LEC, LFU, LRU, NEVER, POLICIES, Bookkeeping
from vllm_spec_plugins.tools import caching


@pytest.mark.parametrize("half_life", [3.0, 50.0, math.inf])
def test_the_order_by_lec_score_is_that_of_decayed_count_times_cost(seed: int, half_life: float) -> None:
    rng = random.Random(seed)
    policy, now = LEC(half_life), 1000.0
    wanted, scores = [], []
    for _ in range(50):
        times = sorted(rng.uniform(900, now) for _ in range(rng.randint(1, 9)))
        cost, weight = rng.lognormvariate(0, 2), NEVER
        for time in times:
            weight = policy.weigh(weight, time)
        wanted.append(cost * sum(2.0 ** ((time - now) / half_life) for time in times))
        scores.append(policy.score(weight, cost, times[-1]))
    assert np.argsort(scores).tolist() == np.argsort(wanted).tolist()


def test_weights_stay_finite_and_exact_decades_later() -> None:
    policy = LEC(60.0)
    now = 2e9  # seconds since the epoch, 33 million half-lives
    twice = policy.weigh(policy.weigh(NEVER, now), now)
    assert twice == pytest.approx(now / 60 + 1, abs=1e-6)
    assert policy.weigh(twice, now + 60) == pytest.approx(now / 60 + 2, abs=1e-6)  # 2 halves to 1, and one more


def test_an_answer_that_costs_nothing_is_the_first_to_go() -> None:
    assert LEC(1.0).score(99.0, 0.0, 5.0) == -math.inf
    assert LFU(1.0).score(99.0, 0.0, 5.0) == 99.0
    assert LRU(1.0).score(99.0, 0.0, 5.0) == 5.0


def ask(cache: Bookkeeping, keys: str, cost: dict[str, float]) -> None:
    for now, key in enumerate(keys):
        if not cache.get(key, now):
            cache.put(key, cost.get(key, 1.0), now)


@pytest.mark.parametrize(
    ("policy", "left"),
    # a is asked for often, b is dear, c came last
    [("lec", {"b"}), ("lfu", {"a"}), ("lru", {"c"})],
)
def test_each_policy_keeps_its_own_favourite(policy: str, left: set[str]) -> None:
    cache = Bookkeeping(POLICIES[policy](math.inf), entries=1, remembered=8)
    ask(cache, "aaabbc", {"b": 100.0})
    assert set(cache.stored) == left


def test_a_new_answer_that_is_worth_least_does_not_enter() -> None:
    cache = Bookkeeping(LEC(math.inf), entries=2, remembered=8)
    assert cache.put("dear", 10.0, 0)
    assert cache.put("dearer", 20.0, 1)
    assert not cache.put("cheap", 1.0, 2)
    assert set(cache.stored) == {"dear", "dearer"}


def test_requests_for_what_is_not_stored_count_towards_its_place() -> None:
    cache = Bookkeeping(LEC(math.inf), entries=1, remembered=8)
    cache.put("first", 1.0, 0)
    for now in range(1, 4):
        assert not cache.get("second", now)
    assert cache.put("second", 1.0, 4)
    assert set(cache.stored) == {"second"}


def test_no_more_keys_are_remembered_than_asked_for_and_old_ones_go_first() -> None:
    cache = Bookkeeping(LEC(5.0), entries=1, remembered=3)
    for now in range(100):
        cache.get(f"key {now}", now)
    assert sorted(cache._seen) == ["key 97", "key 98", "key 99"]


def test_with_a_half_life_lec_follows_traffic_whose_favourites_change(seed: int) -> None:
    """The same traffic, then the same with other queries in the popular places: counts that never decay hold on to the past."""
    rng = np.random.default_rng(seed)
    rank = np.arange(1, 301)
    chance = rank**-1.1 / (rank**-1.1).sum()
    cost = np.exp(rng.standard_normal(300))
    asked = np.concatenate([rng.permutation(300)[rng.choice(300, 4000, p=chance)] for _ in range(4)])
    spent = {}
    for half_life in (1000.0, math.inf):
        cache, spent[half_life] = Bookkeeping(LEC(half_life), entries=20, remembered=80), 0.0
        for now, query in enumerate(asked.tolist()):
            if not cache.get(str(query), now):
                spent[half_life] += float(cost[query])
                cache.put(str(query), float(cost[query]), now)
    assert spent[1000.0] < 0.97 * spent[math.inf]


@pytest.mark.parametrize("costs", ["independent", "popular cheap", "popular dear"])
@pytest.mark.parametrize("exponent", [0.8, 1.1])
def test_lec_costs_less_than_lru_and_lfu_on_zipf_traffic_and_comes_near_the_optimum(
    seed: int, costs: str, exponent: float
) -> None:
    rng = np.random.default_rng(seed)
    spent: dict[str, float] = dict.fromkeys([*POLICIES, "optimum"], 0.0)
    for _ in range(3):
        given = caching.traffic(costs, exponent, rng, queries=600, requests=6000)
        whole = float(given.cost[given.asked].sum())
        shares = {policy: caching.total(policy, given, entries=40) / whole for policy in POLICIES}
        best = caching.optimum(given, entries=40) / whole
        assert best < shares["lec"] < min(shares["lru"], shares["lfu"]), (seed, shares, best)
        for name, share in {**shares, "optimum": best}.items():
            spent[name] += share
    # Of what an ideal cache saves over LRU, LEC saves most.
    assert spent["lru"] - spent["lec"] > 0.6 * (spent["lru"] - spent["optimum"]), spent


def test_with_equal_costs_lec_is_lfu(seed: int) -> None:
    given = caching.traffic("equal", 0.9, np.random.default_rng(seed), queries=600, requests=6000)
    assert caching.total("lec", given, 40) == pytest.approx(caching.total("lfu", given, 40), rel=0.01)
