# SPDX-License-Identifier: Apache-2.0
"""A draft that looks for its own skip set while it serves: when to score, what, and on which text."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.search import Costs, SkipSearch


class SearchedPlan:
    """The best plan that a search has found so far (a `planner.Planner`).

    Scores are taken on a text for which K/V is there: the best plan's first, then those of candidates on the same tokens. What
    scoring may cost is a share of the work that serving does, both in rows that all of the model ran, so a search that is
    slow costs no more.

    Args:
        budget: rows spent on scoring per row of serving.
        every: steps between two scores, at least.
        per_text: candidates scored on one text.
        window: tokens of a text, at most.
    """

    def __init__(
        self, search: SkipSearch, *, budget: float = 0.05, every: int = 16, per_text: int = 8, window: int = 50
    ) -> None:
        self.search = search
        self.budget, self.every, self.per_text, self.window = budget, every, per_text, window
        self._credit, self._steps, self._cost = 0.0, 0, search.costs.of(search.best)
        self._text: Hashable = None
        self._reference: float | None = None
        self._scored: set[LayerPlan] = set()

    def plan(self, places: np.ndarray) -> LayerPlan:
        """The best plan so far."""
        return self.search.best

    def measured(self, costs: Costs) -> None:
        """What the model's blocks cost; before the first score."""
        self.search.costs = costs
        self._cost = costs.of(self.search.best)

    def stepped(self, requests: int) -> None:
        """A step has verified the roots of so many requests. Nodes that it verified are left out of the account: how many were
        scheduled is not known where drafts are made.
        """
        self._steps += 1
        self._credit += self.budget * requests

    def drafted(self, rows: int) -> None:
        """The draft ran so many rows."""
        self._credit += self.budget * rows * self._cost

    def due(self) -> bool:
        """A score can be paid for and is wanted; each costs at most a window's rows of the whole model."""
        return not self.search.settled and self._steps >= self.every and self._credit >= self.window

    def ask(self, text: Hashable) -> LayerPlan | None:
        """The plan to be scored on `text`, known by any name; None: nothing more is to be learnt from this one."""
        if text != self._text:
            self._text, self._reference, self._scored = text, None, set()
        if self._reference is None:
            return self.search.best
        plan = self.search.challenger or self.search.propose()
        done = plan in self._scored or len(self._scored) > self.per_text
        return None if done or self.search.settled else plan

    def tell(self, plan: LayerPlan, matches: int, tokens: int) -> None:
        """`matches` of `tokens` guesses of what `ask` named were right."""
        agreement = matches / tokens
        self._credit -= tokens * self.search.costs.of(plan)
        self._steps = 0
        self.search.tell(plan, agreement, self._reference, tokens)
        self._scored.add(plan)
        if plan == self.search.best:
            self._reference, self._cost = agreement, self.search.costs.of(plan)
