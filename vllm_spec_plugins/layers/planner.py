# SPDX-License-Identifier: Apache-2.0
"""Which part of the model drafts in a step."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.schedule import Schedule


class Planner(Protocol):
    """Says before every step which part of the target drafts. What it says must not depend on timing: every tensor-parallel
    rank asks its own.
    """

    def plan(self, places: np.ndarray) -> LayerPlan:
        """The plan for requests that have generated `places` [B] int64 tokens each."""
        ...


class FixedPlan:
    """Always the same part: an exit layer, or a skip set that was found before."""

    def __init__(self, plan: LayerPlan) -> None:
        self._plan = plan

    def plan(self, places: np.ndarray) -> LayerPlan:
        """The plan."""
        return self._plan


class ScheduledPlan:
    """SkipDecode's schedule drafts: the later in the answer, the fewer layers (arXiv 2307.02628). Verified by all of them, so
    it costs no quality here; and since every layer's K/V is complete then, a batch may run as deep as its youngest answer.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.plans = {budget: schedule.plan(budget) for budget in schedule.distinct}

    def plan(self, places: np.ndarray) -> LayerPlan:
        """That of the request with the fewest tokens."""
        return self.plans[self.schedule.budget(max(0, int(places.min(initial=self.schedule.max_tokens))))]
