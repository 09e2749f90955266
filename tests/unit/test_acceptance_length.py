# SPDX-License-Identifier: Apache-2.0
"""The acceptance lengths of docs/acceptance.md: the arithmetic, and the order of the ways on the tiny models."""

from __future__ import annotations

import pytest
import torch

from tests.models.acceptance import DEPTH, WAYS, WIDTHS, acceptance_lengths, chances, prompt_ids


def test_an_acceptance_length_is_one_more_than_the_tokens_accepted_in_a_row() -> None:
    accepted = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    # From the first token two, then one, none, four.
    assert acceptance_lengths(accepted, depth=4).item() == pytest.approx(1 + (2 + 1 + 0 + 4) / 4)
    assert acceptance_lengths(accepted, depth=2).item() == pytest.approx(1 + (2 + 1 + 0 + 2 + 2 + 2) / 6)
    half = torch.full((3, 9), 0.5)
    assert acceptance_lengths(half, depth=3).tolist() == pytest.approx([1 + 0.5 + 0.25 + 0.125] * 3)


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_on_the_tiny_models_coupled_children_are_followed_further(temperature: float, seed: int) -> None:
    """Than the likeliest ones at any width, and than independent draws from two children on."""
    lengths = acceptance_lengths(chances(prompt_ids(48, 24), 24, temperature, seed)).mean(-1)
    print(WAYS, lengths)
    coupled, rrsw, specinfer, likeliest = lengths
    assert (lengths > 1).all() and (lengths < DEPTH + 1).all()
    assert (lengths.diff(dim=1) > 0).all()
    assert len(coupled) == WIDTHS
    assert (coupled > likeliest + 0.1).all()
    assert (rrsw[1:] > specinfer[1:]).all()
    assert (coupled[2:] > specinfer[2:]).all()
    assert coupled[0] < rrsw[0] + 0.2  # a plain chain: no rule beats sampling the draft
    assert rrsw[0].item() == pytest.approx(specinfer[0].item(), abs=1e-4)
