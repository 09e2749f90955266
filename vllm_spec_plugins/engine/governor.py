# SPDX-License-Identifier: Apache-2.0
"""Leaves drafts out where verifying them takes more time than they save.

What a draft brings is known in expectation (the proposer says how many of its nodes it expects to be accepted), what it
costs depends on machine, model, batch and load: both are measured while serving. The scheduler decides, in one process,
so that all ranks of an engine see the same decision; text never depends on it, since drafts change no token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Draft:
    """One request's proposed tree: how many nodes, and how many of them its proposer expects to be accepted."""

    request: str
    nodes: int
    gain: float


class StepCost:
    """Time of a decode step as a + b * rows + c * [some request has drafts] + d * [trees are proposed at its end], tracked
    by a Kalman filter.

    Times are kept relative to the median of the first ones, which are not learned from (the very first step of a process
    compiles). A row is a token whose logits are computed. Before anything is known, a row costs 1% of a step, drafting 5%
    and proposing 2%: the first drafts are given a chance.
    """

    NOISE = 0.15  # standard deviation of a step's time, as a share of it
    DRIFT = (5e-6, 2.5e-7, 5e-6, 5e-6)  # variance per step by which a, b, c and d may wander
    FIRST = 8  # steps
    CHANGED = 400.0  # factor on it while the times go on surprising

    def __init__(self) -> None:
        self.unit = 0.0
        self.first: list[float] = []
        self.last = self.surprise = 0.0  # the last one and a smoothed one, in standard deviations
        self.state = [1.0, 0.01, 0.05, 0.02]
        deviations = (0.5, 0.02, 0.25, 0.25)
        self.covariance = [[(i == j) * s * s for j in range(4)] for i, s in enumerate(deviations)]

    def observe(self, rows: int, drafted: bool, asked: bool, seconds: float) -> None:
        """Learn from one step. A time far from the expected one (a pause of the process) counts as less far, and as less sure."""
        if len(self.first) < self.FIRST:
            self.first.append(seconds)
            self.unit = median(self.first)
            return
        seen = (1.0, float(rows), float(drafted), float(asked))
        expected = self._of(seen)
        deviation = self.NOISE * max(expected, 1e-3)
        surprise = seconds / self.unit - expected
        far = max(1.0, abs(surprise) / (3 * deviation))
        surprise = min(max(surprise, -3 * deviation), 3 * deviation)
        self.last = surprise / deviation
        self.surprise += 0.15 * (self.last - self.surprise)
        drift = self.CHANGED if self.surprised else 1.0
        # Plain floats: a matrix this small costs NumPy 40 us, which is 1% of a tiny model's step.
        spread = [row[0] + row[1] * seen[1] + row[2] * seen[2] + row[3] * seen[3] for row in self.covariance]
        total = spread[0] + spread[1] * seen[1] + spread[2] * seen[2] + spread[3] * seen[3] + (far * deviation) ** 2
        for i in range(4):
            weight = spread[i] / total
            self.state[i] += weight * surprise
            row = self.covariance[i]
            for j in range(4):
                row[j] -= weight * spread[j]
            row[i] += drift * self.DRIFT[i]

    @property
    def surprised(self) -> bool:
        """The machine, the load or the length of the texts is not what it was."""
        return abs(self.surprise) > 1.5

    def _of(self, seen: tuple[float, float, float, float]) -> float:
        a, b, c, d = self.state
        return a + b * seen[1] + c * seen[2] + d * seen[3]

    def plain(self, batch: int) -> float:
        """A step of `batch` requests without drafts and without a look for any, in units of the first ones."""
        return max(self.state[0] + self.state[1] * batch, 1e-3)

    @property
    def row(self) -> float:
        """One more row."""
        return max(self.state[1], 0.0)

    @property
    def drafting(self) -> float:
        """What a step with drafts costs beyond its rows."""
        return max(self.state[2], 0.0)

    @property
    def proposing(self) -> float:
        """Looking for the next drafts."""
        return max(self.state[3], 0.0)


class Trust:
    """How much of the promised gain comes true: accepted nodes per node promised, recent steps counting most."""

    MEMORY = 0.97  # per draft
    PRIOR = 4.0  # nodes' worth of belief in what all requests together show

    def __init__(self) -> None:
        self.promised = self.accepted = 0.0

    def observe(self, gain: float, accepted: int) -> None:
        self.promised = self.MEMORY * self.promised + gain
        self.accepted = self.MEMORY * self.accepted + accepted

    def factor(self, prior: float) -> float:
        return (self.accepted + self.PRIOR * prior) / (self.promised + self.PRIOR)


class Governor:
    """Decides, step by step, which requests' drafts are verified.

    A row is worth its time if it brings tokens faster than plain decoding does; a step's drafts together must also
    bring back what drafting costs. Now and then a step decides otherwise, so that what is not done is not misjudged for
    good: the more often that confirms the decision, the rarer it gets.
    """

    SOONEST, RAREST = 16, 512  # steps between two looks at the other side
    FADING, SELDOM = 0.1, 0.3  # share of the newest tree in what trees have been worth lately; where few are asked for
    # While that is less than finding them costs, they are looked for in so few steps that it takes SHARE of the time: in
    # every second one at the most, in every 64th at the least.
    SHARE = 0.01
    NAPS = 2, 64

    def __init__(self) -> None:
        self.cost = StepCost()
        self.everyone = Trust()
        self.trust: dict[str, Trust] = {}
        self.promised: dict[str, float] = {}
        self.paying = True
        self.steps, self.interval, self.looks, self.looking = 0, self.SOONEST, 0, False
        self.value = 1.0  # tokens that a step's trees bring beyond what verifying them costs
        self.asked, self.since, self.pause, self.pausing = True, 0, self.SOONEST, False
        self.steady = True  # trees are asked for step by step

    def asks(self, batch: int) -> bool:
        """Whether trees are to be proposed at the end of the next step, of `batch` requests: it takes time too.

        How much is learned from steps that are not asked; while drafts pay, there is one now and then.
        """
        plain = self.cost.plain(batch)
        self.since += 1
        net = self.value - self.cost.proposing * batch / plain
        if net > 0:
            self.steady = True
            self.asked = self.since < min(self.pause, self._rarest(net, batch))
            self.pausing = not self.asked
            if self.pausing:
                self.since, self.pause = 0, min(2 * self.pause, self.RAREST)
        else:
            self.steady = False
            shortest, longest = self.NAPS
            self.asked = self.since >= max(shortest, min(longest, round(self.cost.proposing / (self.SHARE * plain))))
            if self.asked:
                self.since = 0
        return self.asked

    def _rarest(self, lost: float, batch: int) -> int:
        """Steps between two looks at the other side that each lose `lost` tokens, for all looks to cost SHARE: a decision that
        brings little is cheap to check, and the likeliest to be wrong.
        """
        return max(self.SOONEST, min(self.RAREST, round(lost / (self.SHARE * max(1, batch)))))

    def choose(self, batch: int, drafts: Sequence[Draft]) -> set[str]:
        """The requests whose drafts are to be verified in the next step of `batch` requests."""
        drafts = [draft for draft in drafts if draft.nodes]
        if not drafts:
            self._worth(0.0)
            self.promised = {}
            return set()
        speed = batch / self.cost.plain(batch)  # tokens per unit of time
        overall = self.everyone.factor(1.0)
        worth = {}
        for draft in drafts:
            trust = self.trust.get(draft.request)
            factor = trust.factor(overall) if trust else overall
            worth[draft.request] = factor * draft.gain - draft.nodes * self.cost.row * speed
        together = sum(net for net in worth.values() if net > 0) - self.cost.drafting * speed
        paying = together > 0
        self._worth(max(together, 0.0))
        chosen = [draft for draft in drafts if paying and worth[draft.request] > 0]
        lost = together if paying else self.cost.drafting * speed - max(worth.values())
        if self._look(paying, lost, batch):
            # Without drafts, or with the best one alone: that tells the price of a row from the price of drafting.
            alone = not paying or (self.looks % 2 == 0 and len(chosen) > 1)
            chosen = [max(drafts, key=lambda draft: worth[draft.request])] if alone else []
        self.promised = {draft.request: draft.gain for draft in chosen}
        return set(self.promised)

    def _worth(self, tokens: float) -> None:
        if self.asked:
            self.value += (self.FADING if self.steady else self.SELDOM) * (tokens - self.value)

    def _look(self, paying: bool, lost: float, batch: int) -> bool:
        """Whether this step is to go against the decision, which would lose `lost` tokens if that is right."""
        if paying != self.paying or (self.cost.surprised and self.interval > self.SOONEST):
            self.paying, self.steps, self.interval = paying, 0, self.SOONEST
        self.steps += 1
        self.looking = self.steps >= min(self.interval * max(1.0, lost / max(1, batch)), self._rarest(lost, batch))
        if not self.looking:
            return False
        self.steps, self.interval, self.looks = 0, min(2 * self.interval, self.RAREST), self.looks + 1
        return True

    def observe(self, batch: int, nodes: int, seconds: float) -> None:
        """A step that only decoded: `batch` requests, `nodes` draft nodes among its rows."""
        self.cost.observe(batch + nodes, nodes > 0, self.asked, seconds)
        if abs(self.cost.last) > 2:
            if self.looking:
                self.interval = self.SOONEST
            if self.pausing:
                self.pause = self.SOONEST
        self.looking = self.pausing = False

    def accepted(self, request: str, count: int) -> None:
        """The outcome of a draft that was chosen."""
        gain = self.promised.pop(request, None)
        if gain is not None:
            self.trust.setdefault(request, Trust()).observe(gain, count)
            self.everyone.observe(gain, count)

    def forget(self, requests: Iterable[str]) -> None:
        """Requests that have ended."""
        for request in requests:
            self.trust.pop(request, None)
