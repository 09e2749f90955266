# SPDX-License-Identifier: Apache-2.0
"""The union of several sources' trees: the kernels keep what the compiled loops and the tensor code keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Cases
from tests.kernels.guarded import Guarded
from tests.unit.tree.naive import random_tree
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import union as kernel
from vllm_spec_plugins.tree import Forest, TokenTree, union, union_loops
from vllm_spec_plugins.tree.union import MOST


def some_forest(rng: torch.Generator, batch: int, sizes: tuple[int, ...], tied: bool) -> tuple[Forest, Tensor]:
    """Random trees of few tokens, and their path chances [B, M]; tied: powers of a half by depth."""
    trees = []
    for size in sizes:
        tree = random_tree(rng, batch, size, 3)
        given = torch.full((batch, size), 0.5) if tied else torch.rand(batch, size, generator=rng)
        chance = torch.zeros(batch, size + 1, dtype=torch.float64)
        chance[:, 0] = 1.0
        for node in range(size):
            above = chance.gather(1, tree.parents[:, node : node + 1])[:, 0]
            chance[:, node + 1] = above * given[:, node] * (tree.tokens[:, node] >= 0)
        trees.append(TokenTree(tree.tokens, tree.parents, size, chance=chance[:, 1:].contiguous()))
    return Forest.of(trees), torch.cat([tree.chance for tree in trees], 1)


def test_the_union_is_that_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(kernel._odds_kernel, kernel._union_kernel):
        sizes, tied, batch, memory = tuple(draw.numbers((1, 3), (0, 9))), draw.flip(), draw.number(1, 3), Guarded(rng)
        sizes = sizes if any(sizes) else (1,)
        nodes, least = draw.number(1, sum(sizes)), draw.one_of(0.0, 0.05, 0.1)
        limit = draw.one_of(999, draw.number(0, nodes))
        forest, chance = some_forest(rng, batch, sizes, tied)
        parts = forest.tokens, forest.parents, chance, forest.source
        odds = kernel.forest_odds(*parts, MOST, memory(chance.shape, torch.float64))
        looped = union_loops.forest_odds(*(part.numpy() for part in parts), MOST)
        np.testing.assert_allclose(odds, looped, rtol=1e-12)
        torch.testing.assert_close(odds, forest.odds, rtol=1e-12, atol=0)

        weights = torch.rand(batch, len(sizes), generator=rng).double() * 3
        if tied:
            weights = torch.ones_like(weights)
        out = memory((batch, nodes), torch.int64), memory((batch, nodes), torch.int64)
        given = forest.tokens, forest.parents, forest.odds, forest.source, weights
        deepest = forest.max_depth
        found = kernel.union(*given, nodes, limit, least, deepest, (*out, memory((batch, nodes), torch.float64)))
        TokenTree(found[0], found[1]).validate()
        for use_loops in (True, False):
            monkeypatch.setattr(compiled, "use_loops", use_loops)
            expected = union(forest, weights, nodes, limit, least)
            assert torch.equal(found[0], expected.tokens)
            assert torch.equal(found[1], expected.parents)
            torch.testing.assert_close(found[2], expected.chance, rtol=1e-9, atol=0)
        memory.assert_untouched()


def test_another_weight_makes_another_tree(rng: torch.Generator) -> None:
    """The control: the budget goes to the source that is believed."""
    tokens, parents = torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=torch.int64)
    odds, source = torch.ones(1, 2, dtype=torch.float64), torch.tensor([0, 1])
    for believed in (0, 1):
        weights = torch.ones(1, 2, dtype=torch.float64)
        weights[0, believed] = 2.0
        found = kernel.union(tokens, parents, odds, source, weights, 1, 1, 0.0, 1)
        assert found[0].tolist() == [[believed + 1]]
        assert found[2].tolist() == [[pytest.approx(2 / 4)]]
