# SPDX-License-Identifier: Apache-2.0
"""N-grams as a tree: the kernel keeps the nodes that the compiled loop and the tensor code keep, equals included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.guarded import Guarded
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import trie as kernel
from vllm_spec_plugins.tree import TokenTree, loops
from vllm_spec_plugins.tree.builders import trie


def some_ngrams(rng: torch.Generator, batch: int, count: int, length: int, tied: bool) -> tuple[Tensor, Tensor]:
    ngrams = torch.randint(3, (batch, count, length), generator=rng)
    ends = torch.randint(length + 1, (batch, count, 1), generator=rng)
    odds = torch.rand(batch, count, length, generator=rng) * 3
    if tied:  # odds of 1 and 3: chances are products of few different shares
        odds = torch.where(odds > 1.5, 3.0, 1.0)
    return ngrams.masked_fill_(torch.arange(length) >= ends, -1), odds


@pytest.mark.parametrize(("count", "length"), [(1, 16), (2, 16), (5, 3), (9, 4), (3, 1), (17, 5)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_tree_is_that_of_the_plain_versions(
    count: int, length: int, tied: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Guarded(rng)
    for nodes, limit, least in [(count * length, 99, 0.0), (7, 5, 0.0), (11, 8, 0.12), (3, 0, 0.0)]:
        ngrams, odds = some_ngrams(rng, 2, count, length, tied)
        out = memory((2, nodes), torch.int64), memory((2, nodes), torch.int64), memory((2, nodes), torch.float64)
        tokens, parents, chance = kernel.trie(ngrams, nodes, limit, odds, least, out)
        TokenTree(tokens, parents, min(length, nodes)).validate()
        looped = loops.trie(ngrams.numpy(), nodes, min(limit, nodes), odds.double().numpy(), least)
        assert np.array_equal(tokens, looped[0])
        assert np.array_equal(parents, looped[1])
        np.testing.assert_allclose(chance, looped[2], rtol=1e-12)
        monkeypatch.setattr(compiled, "use_loops", False)
        plain = trie(ngrams, nodes, limit, odds.double(), least)
        assert torch.equal(tokens, plain.tokens)
        assert torch.equal(parents, plain.parents)
        torch.testing.assert_close(chance, plain.chance, rtol=1e-12, atol=0)
    memory.assert_untouched()


def test_other_odds_make_another_tree(rng: torch.Generator) -> None:
    """The control: the budget goes to the likeliest nodes."""
    ngrams = torch.arange(24).view(1, 4, 6)
    odds = torch.ones(1, 4, 6)
    odds[0, 3] = 9.0
    tokens, _, _ = kernel.trie(ngrams, 6, 6, odds, 0.0)
    other, _, _ = kernel.trie(ngrams, 6, 6, odds.flip(1).contiguous(), 0.0)
    assert tokens.tolist() == [list(range(18, 24))]
    assert other.tolist() == [list(range(6))]
