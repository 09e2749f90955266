# SPDX-License-Identifier: Apache-2.0
"""What an answer cache saves, by what it evicts: Zipf traffic through the cache's own rules.

    python -m vllm_spec_plugins.tools.bench cache

No server and no model: queries are numbers, the k-th most popular one is asked with probability proportional to k^-exponent, and
every query has a cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_spec_plugins.cascade.eviction import POLICIES, Bookkeeping

NAMES = tuple(POLICIES)
QUERIES, REQUESTS, TRAFFICS = 2000, 20_000, 4
REMEMBERED = 4  # keys without an answer per entry, as the settings have it
SPREAD = 1.5  # standard deviation of the logarithm of a query's cost

# What a query's cost has to do with its popularity; zipf exponent; room for answers.
LINES = tuple(
    (costs, exponent, entries)
    for costs in ("independent", "popular cheap", "popular dear", "equal")
    for exponent, entries in ((0.8, 100), (1.1, 100), (0.8, 400))
)


@dataclass(frozen=True)
class Traffic:
    """Requests for queries, by popularity.

    Attributes:
        asked: [T] int64, the query of each request.
        chance: [N] float64, of each query, falling.
        cost: [N] float64, of answering it.
    """

    asked: np.ndarray
    chance: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True)
class Saved:
    """Costs as shares of what the traffic costs without a cache.

    Attributes:
        costs, exponent, entries: the line's.
        cost: by policy.
        optimum: of the L answers with the largest chance * cost, there from the start and never changed.
    """

    costs: str
    exponent: float
    entries: int
    cost: dict[str, float]
    optimum: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def traffic(costs: str, exponent: float, rng: np.random.Generator, queries: int, requests: int) -> Traffic:
    """Random costs and requests. `costs`: independent of popularity, popular cheap, popular dear, or equal."""
    rank = np.arange(1, queries + 1)
    chance = rank**-exponent
    chance /= chance.sum()
    power = {"independent": 0.0, "popular cheap": 0.5, "popular dear": -0.5, "equal": 0.0}[costs]
    spread = 0.0 if costs == "equal" else SPREAD
    cost = np.exp(spread * rng.standard_normal(queries)) * rank**power
    return Traffic(rng.choice(queries, requests, p=chance), chance, cost)


def total(policy: str, given: Traffic, entries: int) -> float:
    """The cost of the answers that had to be made."""
    cache = Bookkeeping(POLICIES[policy](float("inf")), entries, REMEMBERED * entries)
    spent = 0.0
    for now, query in enumerate(given.asked.tolist()):
        key = str(query)
        if not cache.get(key, now):
            cost = float(given.cost[query])
            spent += cost
            cache.put(key, cost, now)
    return spent


def optimum(given: Traffic, entries: int) -> float:
    """The same with the `entries` answers of the largest chance * cost always there."""
    kept = np.argsort(-given.chance * given.cost)[:entries]
    cost = given.cost.copy()
    cost[kept] = 0
    return float(cost[given.asked].sum())


def measure(seed: int, say: Callable[[str], None] = lambda _: None) -> list[Saved]:
    """Every line of LINES, the mean of TRAFFICS traffics."""
    lines = []
    for number, (costs, exponent, entries) in enumerate(LINES):
        say(f"costs {costs}, exponent {exponent:g}, room for {entries}")
        rng = np.random.default_rng([seed, number])
        made = [traffic(costs, exponent, rng, QUERIES, REQUESTS) for _ in range(TRAFFICS)]
        whole = np.array([float(given.cost[given.asked].sum()) for given in made])

        def share(spent: list[float], whole: np.ndarray = whole) -> float:
            return float((np.array(spent) / whole).mean())

        lines.append(
            Saved(
                costs,
                exponent,
                entries,
                {policy: share([total(policy, given, entries) for given in made]) for policy in NAMES},
                share([optimum(given, entries) for given in made]),
            )
        )
    return lines
