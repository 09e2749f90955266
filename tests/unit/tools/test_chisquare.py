# SPDX-License-Identifier: Apache-2.0
"""The chi-square test of whole sequences: cells cover everything, honest samples pass, others do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from vllm_spec_plugins.tools import chisquare

VOCABULARY, LENGTH = 12, 3


def language(seed: int, temperature: float = 1.0) -> chisquare.Conditional:
    """Next-token probabilities that depend on the whole prefix."""

    def conditional(prefixes: Sequence[chisquare.Prefix]) -> np.ndarray:
        rows = []
        for prefix in prefixes:
            logits = np.random.default_rng([seed, *prefix]).normal(0, 2, VOCABULARY) / temperature
            rows.append(np.exp(logits) / np.exp(logits).sum())
        return np.array(rows)

    return conditional


def draw(conditional: chisquare.Conditional, count: int, generator: np.random.Generator) -> list[chisquare.Prefix]:
    sequences: list[chisquare.Prefix] = [()] * count
    for _ in range(LENGTH):
        known = sorted(set(sequences))
        rows = dict(zip(known, conditional(known), strict=True))
        sequences = [(*s, int(generator.choice(VOCABULARY, p=rows[s]))) for s in sequences]
    return sequences


def test_groups_cover_every_sequence_and_hold_its_probability(seed: int) -> None:
    conditional = language(seed)
    cells = chisquare.partition(conditional, LENGTH, samples=500)
    exact = np.zeros(len(cells.probability))
    (first,) = conditional([()])
    for a in range(VOCABULARY):
        (second,) = conditional([(a,)])
        for b in range(VOCABULARY):
            (third,) = conditional([(a, b)])
            for c in range(VOCABULARY):
                exact[cells.group((a, b, c))] += first[a] * second[b] * third[c]
    assert cells.probability == pytest.approx(exact, abs=1e-12)
    assert cells.probability.sum() == pytest.approx(1)
    assert (cells.probability * 500).min() >= 8


def test_p_values_of_honest_samples_are_uniform(seed: int) -> None:
    conditional, generator = language(seed), np.random.default_rng(seed)
    cells = chisquare.partition(conditional, LENGTH, samples=600)
    p = [chisquare.test(cells.count(draw(conditional, 600, generator)), cells.probability).p for _ in range(60)]
    # Kolmogorov-Smirnov at 1e-6 for 60 values: sqrt(ln(2e6) / 120).
    assert np.abs(np.sort(p) - (np.arange(60) + 0.5) / 60).max() < 0.36


def test_samples_of_another_temperature_are_told_apart(seed: int) -> None:
    generator = np.random.default_rng(seed)
    cells = chisquare.partition(language(seed), LENGTH, samples=4000)
    sequences = draw(language(seed, temperature=1.25), 4000, generator)
    assert chisquare.test(cells.count(sequences), cells.probability).p < 1e-6


def test_a_dependence_between_tokens_is_told_apart(seed: int) -> None:
    """Each token's own distribution is right, but the second forgets the first: only a joint test can see it."""
    conditional, generator = language(seed), np.random.default_rng(seed)
    cells = chisquare.partition(conditional, LENGTH, samples=4000)
    sequences = draw(conditional, 4000, generator)
    seconds = generator.permutation([s[1] for s in sequences])
    broken = [(s[0], int(b), s[2]) for s, b in zip(sequences, seconds, strict=True)]
    assert chisquare.test(cells.count(broken), cells.probability).p < 1e-6


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples are too few"):
        chisquare.partition(language(0), LENGTH, samples=3)


def test_one_p_value_stands_for_several_tests() -> None:
    fine, bad = chisquare.Result(10.0, 10, 0.5), chisquare.Result(900.0, 10, 0.0)
    assert chisquare.combined([fine, fine, fine]) > 0.3
    assert chisquare.combined([fine, bad, fine]) < 1e-100
