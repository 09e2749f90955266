# SPDX-License-Identifier: Apache-2.0
"""What a full cache keeps: least expected cost (LEC), beside least recently (LRU) and least frequently used (LFU).

Zhu et al., "On Optimal Caching and Model Multiplexing for Large Model Inference", arXiv 2306.02003: with room for L answers, keep
those with the largest P(q) * C(q), the chance that q is asked next times what answering it costs; a new answer enters only
if it is not itself the least.

P(q) is not known. It is proportional to the decayed count of q's requests at times t_i, seen from any later time T,

    w(q, T) = sum_i 2^((t_i - T) / half_life),

and what is kept is log2 sum_i 2^(t_i / half_life), which does not change as time passes (forward decay; Cormode et al., "Forward
Decay", ICDE 2009). So every policy is a score that only a request for its own answer changes: a store keeps it under an index,
and what goes is the answer with the least, whatever the time.

Requests for keys without an answer count as well, or an answer that is worth its place could never earn it: a bounded number of
such keys is remembered with their weights, those with the smallest forgotten first, which are the ones not asked for lately.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

NEVER = -math.inf  # the weight of a key that nobody asked for


class Policy(ABC):
    """Scores answers; a full cache drops the one with the least, of equal ones that with the smallest key.

    Args:
        half_life: seconds after which a request counts half; inf: all requests count alike.
    """

    name: ClassVar[str]

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life

    def weigh(self, weight: float, now: float) -> float:
        """`weight`, a log2 of decayed counts or NEVER, after one more request at `now` (seconds)."""
        request = now / self.half_life
        high, low = max(weight, request), min(weight, request)
        return high + math.log2(1 + 2.0 ** (low - high))

    @abstractmethod
    def score(self, weight: float, cost: float, last: float) -> float:
        """What the answer is worth: its weight, what it costs (>= 0), when it was last asked for (seconds)."""


class LEC(Policy):
    """Least expected cost: weight + log2 cost, the order of w(q, T) * C(q) at any T."""

    name = "lec"

    def score(self, weight: float, cost: float, last: float) -> float:
        return weight + math.log2(cost) if cost > 0 else -math.inf


class LFU(Policy):
    """Least frequently used: the weight alone, with the same memory of keys without an answer as LEC."""

    name = "lfu"

    def score(self, weight: float, cost: float, last: float) -> float:
        return weight


class LRU(Policy):
    """Least recently used."""

    name = "lru"

    def score(self, weight: float, cost: float, last: float) -> float:
        return last


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LEC, LFU, LRU)}


class Ranking:
    """Keys by a number each; the least is found in logarithmic time."""

    def __init__(self) -> None:
        self._value: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._value)

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def set(self, key: str, value: float) -> None:
        self._value[key] = value
        heapq.heappush(self._heap, (value, key))
        if len(self._heap) > 64 + 4 * len(self._value):  # mostly numbers that were replaced
            self._heap = [(value, key) for key, value in self._value.items()]
            heapq.heapify(self._heap)

    def pop(self, key: str, default: float) -> float:
        return self._value.pop(key, default)

    def get(self, key: str, default: float) -> float:
        return self._value.get(key, default)

    def pop_least(self) -> tuple[str, float]:
        while True:
            value, key = heapq.heappop(self._heap)
            if self._value.get(key) == value:
                return key, self._value.pop(key)


class Bookkeeping:
    """Which of the keys asked for have an answer: the rule that every store follows, on dictionaries.

    Args:
        policy: which answers are worth more.
        entries: L, answers that there is room for.
        remembered: keys without an answer whose weights are kept.
    """

    def __init__(self, policy: Policy, entries: int, remembered: int) -> None:
        self.policy, self.entries, self.remembered = policy, entries, remembered
        self.stored, self._seen = Ranking(), Ranking()
        self._weight: dict[str, float] = {}
        self._cost: dict[str, float] = {}

    def get(self, key: str, now: float) -> bool:
        """One request for `key`: counted, and whether its answer is here."""
        if key not in self.stored:
            self._remember(key, self.policy.weigh(self._seen.get(key, NEVER), now))
            return False
        self._weight[key] = self.policy.weigh(self._weight[key], now)
        self.stored.set(key, self.policy.score(self._weight[key], self._cost[key], now))
        return True

    def put(self, key: str, cost: float, now: float) -> bool:
        """An answer for `key`, asked for before or else once, now. False: the others are worth more than it."""
        known = self._weight.get(key) if key in self.stored else None
        weight = self._seen.pop(key, NEVER) if known is None else known
        weight = self.policy.weigh(NEVER, now) if weight == NEVER else weight
        self._weight[key], self._cost[key] = weight, cost
        self.stored.set(key, self.policy.score(weight, cost, now))
        while len(self.stored) > self.entries:
            least, _ = self.stored.pop_least()
            del self._cost[least]
            self._remember(least, self._weight.pop(least))
        return key in self.stored

    def _remember(self, key: str, weight: float) -> None:
        self._seen.set(key, weight)
        while len(self._seen) > self.remembered:
            self._seen.pop_least()
