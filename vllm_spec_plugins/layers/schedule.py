# SPDX-License-Identifier: Apache-2.0
"""SkipDecode's schedule: how many layers the token at each place of an answer gets.

Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
arXiv 2307.02628, section 3: the budget depends on the token's place alone and never grows, and what is skipped lies between
the first layers and the last. So the layers that a token runs are a subset of those that every earlier token ran: all the K/V
that it reads exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_spec_plugins.layers.plan import LayerPlan


@dataclass(frozen=True)
class Schedule:
    """Budgets by place. The row at position prompt_len + i (the i-th generated token going in) runs `budget(i)` layers: the
    first `warmup` and the last `budget(i) - warmup`. Rows of the prompt run all layers.

    Attributes:
        num_layers: L of the model.
        max_layers, min_layers: of the first and the last place; warmup <= min_layers <= max_layers <= num_layers.
        warmup: layers at the bottom that always run.
        max_tokens: places over which the budget falls; later ones get `min_layers`.
        levels: so many different budgets, each for as many places as the others (rows at the same level can share a step
            that is no deeper than they are); 0: the paper's straight line, rounded.
    """

    num_layers: int
    max_layers: int
    min_layers: int
    warmup: int = 1
    max_tokens: int = 256
    levels: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= self.min_layers <= self.max_layers <= self.num_layers or self.min_layers < 1:
            raise ValueError(
                f"warmup={self.warmup}, min_layers={self.min_layers}, max_layers={self.max_layers} must not fall, "
                f"and a model of {self.num_layers} layers bounds them"
            )
        if self.max_tokens < 1 or not 0 <= self.levels <= self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be at least 1, levels={self.levels} at least 0 and no more than those"
            )

    @classmethod
    def for_speedup(cls, num_layers: int, speedup: float, **others: int) -> Schedule:
        """A schedule whose average budget, (max + min) / 2, is num_layers / speedup (section 3.2), with max near 2 * min."""
        average = num_layers / speedup
        least = max(1, others.get("warmup", 1))
        low = min(max(least, round(average * 2 / 3)), num_layers)
        return cls(num_layers, min(num_layers, max(low, round(2 * average - low))), low, **others)

    @cached_property
    def budgets(self) -> np.ndarray:
        """[max_tokens] int64: the layers of each place, never growing."""
        place = np.arange(self.max_tokens)
        fall = self.max_layers - self.min_layers
        if self.levels == 0:
            line = place / max(self.max_tokens - 1, 1)
        elif self.levels == 1:
            line = np.full(self.max_tokens, 0.5)
        else:
            line = (place * self.levels // self.max_tokens) / (self.levels - 1)
        return np.floor(self.max_layers - fall * line + 0.5).astype(np.int64)

    def budget(self, place: int) -> int:
        """Layers that the row of generated token `place` >= 0 runs."""
        return int(self.budgets[min(place, self.max_tokens - 1)])

    def of_places(self, places: np.ndarray) -> np.ndarray:
        """`budget` of each [n]; all layers for negative places, which are the prompt's."""
        found = self.budgets[np.clip(places, 0, self.max_tokens - 1)]
        return np.where(places < 0, self.num_layers, found)

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """The budgets that occur, deepest first."""
        return tuple(int(budget) for budget in np.unique(self.budgets)[::-1])

    @property
    def average(self) -> float:
        """Mean budget over the places of `max_tokens`."""
        return float(self.budgets.mean())

    def needs(self, layer: int) -> int:
        """The least budget with which a row runs `layer`; 0 for those that always run."""
        return 0 if layer < self.warmup else self.num_layers - layer + self.warmup

    def plan(self, budget: int) -> LayerPlan:
        """The layers of a row with `budget`."""
        return LayerPlan.of_layers(self.num_layers, [i for i in range(self.num_layers) if self.needs(i) <= budget])

    @property
    def key(self) -> tuple[int, ...]:
        """What tells two schedules' K/V apart."""
        return (self.num_layers, self.max_layers, self.min_layers, self.warmup, self.max_tokens, self.levels)

    def __str__(self) -> str:
        return (
            f"{', '.join(map(str, self.distinct))} of {self.num_layers} layers over {self.max_tokens} tokens, "
            f"{self.average:.1f} on average, the first {self.warmup} always"
        )
