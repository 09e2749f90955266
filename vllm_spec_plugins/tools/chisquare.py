# SPDX-License-Identifier: Apache-2.0
"""Are these sequences drawn from that distribution? Pearson's chi-square test over whole sequences of tokens.

Sequences of a few tokens have far too many values for one cell each. `partition` makes cells from the exact
probabilities alone, never from the samples, so the statistic keeps its chi-square distribution: a sequence expected often
enough is a cell; what follows a prefix otherwise is one cell per prefix; cells still too small share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, combine_pvalues

Prefix = tuple[int, ...]

# prefixes of one length -> [prefixes, vocabulary] probabilities of the next token, each row summing to 1
Conditional = Callable[[Sequence[Prefix]], np.ndarray]


@dataclass(frozen=True)
class Partition:
    """Cells that cover all sequences of `length` tokens.

    Attributes:
        cells: a sequence, or a prefix that stands for every continuation without a cell of its own -> its group.
        probability: [groups], sums to 1.
    """

    length: int
    cells: dict[Prefix, int]
    probability: np.ndarray

    def group(self, sequence: Prefix) -> int:
        """The group of one sequence: that of its longest prefix with a cell."""
        for length in range(self.length, -1, -1):
            if (group := self.cells.get(sequence[:length])) is not None:
                return group
        raise AssertionError("the empty prefix always has a cell")

    def count(self, sequences: Iterable[Prefix]) -> np.ndarray:
        """[groups] int64, how many sequences fall into each."""
        groups = [self.group(sequence) for sequence in sequences]
        return np.bincount(groups, minlength=len(self.probability))


def partition(conditional: Conditional, length: int, samples: int, least: float = 8.0) -> Partition:
    """Cells for `samples` sequences of `length` tokens, each group expected at least `least` times.

    Raises ValueError when so few samples leave fewer than two groups.
    """
    mass: dict[Prefix, float] = {}
    expanded: dict[Prefix, float] = {(): 1.0}
    for depth in range(1, length + 1):
        deeper: dict[Prefix, float] = {}
        for (prefix, whole), row in zip(expanded.items(), conditional(list(expanded)), strict=True):
            joint = row.astype(np.float64) * whole
            large = np.flatnonzero(joint * samples >= least)
            deeper.update({(*prefix, int(token)): float(joint[token]) for token in large})
            mass[prefix] = max(0.0, whole - float(joint[large].sum()))
        if depth == length:
            mass.update(deeper)
        expanded = deeper
    return _merged(mass, length, samples, least)


def _merged(mass: dict[Prefix, float], length: int, samples: int, least: float) -> Partition:
    """Cells too small for a group of their own share one; should that still be too small, the smallest large one joins."""
    own = sorted((prefix for prefix, p in mass.items() if p * samples >= least), key=lambda prefix: -mass[prefix])
    shared = [prefix for prefix in mass if mass[prefix] * samples < least]
    if own and sum(mass[prefix] for prefix in shared) * samples < least:
        shared.append(own.pop())
    cells = {prefix: group for group, prefix in enumerate(own)}
    cells.update(dict.fromkeys(shared, len(own)))
    probability = np.zeros(len(own) + 1)
    for prefix, group in cells.items():
        probability[group] += mass[prefix]
    if len(probability) < 2:
        raise ValueError(f"{samples} samples are too few for a chi-square test of {length} tokens")
    return Partition(length, cells, probability / probability.sum())


@dataclass(frozen=True)
class Result:
    """Outcome of one test: `p` is how often honest samples would deviate as much."""

    statistic: float
    degrees: int
    p: float


def test(counts: np.ndarray, probability: np.ndarray) -> Result:
    """Pearson's test of `counts` [groups] against `probability` [groups]."""
    expected = counts.sum() * probability
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(counts) - 1
    return Result(statistic, degrees, float(chi2.sf(statistic, degrees)))


def combined(results: Sequence[Result]) -> float:
    """One p-value of independent tests (Fisher's method)."""
    smallest = np.finfo(float).tiny  # a p that underflowed is not zero
    return float(combine_pvalues([max(r.p, smallest) for r in results], method="fisher").pvalue)
