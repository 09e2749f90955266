# SPDX-License-Identifier: Apache-2.0
"""N-grams as a tree: the kernel keeps the nodes that the compiled loop and the tensor code keep, equals included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Cases
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


def test_the_tree_is_that_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "use_loops", False)
    for draw in cases(kernel._trie_kernel):
        batch, count, length, tied = draw.number(1, 3), draw.number(1, 9), draw.number(1, 9), draw.flip()
        nodes, least, memory = draw.number(1, count * length), draw.one_of(0.0, 0.05, 0.12), Guarded(rng)
        limit = draw.one_of(999, draw.number(0, nodes))
        ngrams, odds = some_ngrams(rng, batch, count, length, tied)
        odds = odds.to(draw.one_of(torch.float32, torch.float64))
        shape = batch, nodes
        out = memory(shape, torch.int64), memory(shape, torch.int64), memory(shape, torch.float64)
        tokens, parents, chance = kernel.trie(ngrams, nodes, limit, odds, least, out)
        TokenTree(tokens, parents, min(length, nodes)).validate()
        looped = loops.trie(ngrams.numpy(), nodes, min(limit, nodes), odds.double().numpy(), least)
        assert np.array_equal(tokens, looped[0])
        assert np.array_equal(parents, looped[1])
        np.testing.assert_allclose(chance, looped[2], rtol=1e-12)
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
