# SPDX-License-Identifier: Apache-2.0
"""What an early-exit policy is given and what it answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(eq=False)
class ExitSignals:
    """What is known of M tokens at an exit.

    Attributes:
        layer: layers run so far.
        tokens: [M] int64, the tokens that went in.
        logits: [M, V], of the final norm and the LM head on `hidden`.
        hidden: [M, H], the residual stream here, before the final norm.
        earlier: [M, E] int64, the likeliest tokens at the exits before in the same pass, oldest first; E may be 0.
        earlier_hidden: [M, H], `hidden` at the exit before; None at the first.
    """

    layer: int
    tokens: Tensor
    logits: Tensor
    hidden: Tensor
    earlier: Tensor
    earlier_hidden: Tensor | None = None


@dataclass(eq=False)
class ExitPolicy(ABC):
    """A score and what it must reach.

    Attributes:
        bound: what is good enough, in the policy's own unit; a least value, for the entropies a largest one.
    """

    bound: float

    name: ClassVar[str]
    example: ClassVar[str]
    least: ClassVar[float] = 0.0
    most: ClassVar[float] = 1.0

    @abstractmethod
    def score(self, signals: ExitSignals) -> Tensor:
        """[M] float32, larger = safer."""

    @property
    def threshold(self) -> float:
        """The least score that is good enough."""
        return self.bound

    @property
    def exits_needed(self) -> int:
        """Exits of one pass without which no answer is good, this one included; 0: the answer is known before the pass."""
        return 1

    def good(self, signals: ExitSignals) -> Tensor:
        """[M] bool: the answer here is good enough."""
        return self.score(signals) >= self.threshold

    def check(self, exits: Sequence[int], vocab: int, hidden: int) -> None:
        """Raise ValueError, with a clause that says why, unless this policy fits a model's exits, vocabulary and width."""
        if self.exits_needed > len(exits):
            raise ValueError(f"{self} compares {self.exits_needed} exits of a pass, and this one has {len(exits)}")

    @classmethod
    def parse(cls, text: str, device: torch.device | str) -> Self:
        """From the whole text of a setting; as `policy`."""
        return cls(cls._bound(text, text.partition(":")[2]))

    @classmethod
    def _bound(cls, text: str, number: str) -> float:
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not (math.isfinite(bound) and cls.least <= bound <= cls.most):
            valid = f"{cls.least:g} or more" if cls.most == math.inf else f"{cls.least:g} to {cls.most:g}"
            raise ValueError(f"{text} has {number!r} where a number of {valid} belongs; write {cls.example}")
        return bound

    def __str__(self) -> str:
        return f"{self.name}:{self.bound:g}"
