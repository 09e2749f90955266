# SPDX-License-Identifier: Apache-2.0
"""How many random cases every kernel is compared in, and what counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

T = TypeVar("T")

CASES = 50


class Draw:
    """Random choices of one case."""

    def __init__(self, rng: torch.Generator) -> None:
        self.rng, self.drawn = rng, list[Any]()

    def number(self, low: int, high: int) -> int:
        """low to high, both included."""
        self.drawn.append(int(torch.randint(low, high + 1, (), generator=self.rng)))
        return int(self.drawn[-1])

    def one_of(self, *choices: T) -> T:
        return choices[self.number(0, len(choices) - 1)]

    def flip(self) -> bool:
        return self.number(0, 1) > 0

    def numbers(self, count: tuple[int, int], each: tuple[int, int]) -> list[int]:
        """Some numbers, as many as `count` says."""
        return [self.number(*each) for _ in range(self.number(*count))]


Cases = Callable[..., Iterator[Draw]]


def random_cases(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, kernels: Sequence[Any]) -> Iterator[Draw]:
    """Cases until each of `kernels` was launched in CASES of them; what one leaves is compared before the next is asked for.

    Raises AssertionError when a kernel is launched in less than every fourth case, or most cases draw what others drew.
    """
    launched: set[int] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add(id(self))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    cases: Counter[int] = Counter()
    drawn = []
    while min(cases[id(kernel)] for kernel in kernels) < CASES:
        counts = {kernel.__name__: cases[id(kernel)] for kernel in kernels}
        assert len(drawn) < 4 * CASES, f"launched in {counts} of {len(drawn)} cases"
        launched.clear()
        draw = Draw(rng)
        yield draw
        cases.update(launched)
        drawn.append(tuple(draw.drawn))
    assert 2 * len(set(drawn)) > len(drawn), f"{len(set(drawn))} different ones among {len(drawn)} cases"
