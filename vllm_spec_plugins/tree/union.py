# SPDX-License-Identifier: Apache-2.0
"""One tree from the trees of several sources: equal paths are shared, and the likeliest nodes get the budget.

The union of several drafts' trees is SpecInfer's merge (Miao et al., arXiv 2305.09781, section 3); here its nodes are
ranked, and a source counts for as much as it has kept of its promises (calibration.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.tree.builders import placed
from vllm_spec_plugins.tree.tree import TokenTree

# Chance per token of a source that gives none, until it has shown what its nodes are worth.
UNSAID = 0.5
# The children of one node are never right with more than this chance: odds stay finite.
MOST = 0.99


@lru_cache(maxsize=16)
def source_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[M] int64: the source of each node of a forest, by the nodes of each source's trees."""
    every = [source for source, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(every, dtype=torch.int64, device=device)


@lru_cache(maxsize=16)
def _before(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[M] int64: how many nodes stand before the first of each node's source."""
    every = [sum(sizes[:source]) for source, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(every, dtype=torch.int64, device=device)


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of S sources side by side below one root. M: their nodes together; absent ones may stand anywhere.

    Attributes:
        tokens: [B, M] int64; -1 = no node.
        parents: [B, M] int64, rows of the forest, 0 = root; a parent stands before its children.
        odds: [B, M] float64, of a node against all that its source proposes beside it and itself being wrong, given that
            the path to it is right; 0 for absent nodes. A source's own share of a place: odds / (1 + its odds there).
        source: [M] int64.
        max_depth: no node lies deeper.
    """

    tokens: Tensor
    parents: Tensor
    odds: Tensor
    source: Tensor
    max_depth: int

    @classmethod
    def of(cls, trees: Sequence[TokenTree]) -> Forest:
        """From one batch of trees per source. Trees without chances get UNSAID per token."""
        sizes, device = tuple(tree.tokens.shape[1] for tree in trees), trees[0].tokens.device
        source = source_of(sizes, device)
        tokens, parents = torch.cat([tree.tokens for tree in trees], 1), torch.cat([tree.parents for tree in trees], 1)
        parents = parents + _before(sizes, device) * (parents > 0)
        chance = torch.cat([_chance(tree).double() for tree in trees], 1)
        return cls(tokens, parents, _odds(tokens, parents, chance, source), source, max(t.max_depth for t in trees))


def _chance(tree: TokenTree) -> Tensor:
    return UNSAID ** tree.depth[:, 1:] * (tree.tokens >= 0) if tree.chance is None else tree.chance


def _odds(tokens: Tensor, parents: Tensor, chance: Tensor, source: Tensor) -> Tensor:
    """`Forest.odds` from path chances [B, M]."""
    if loops_for(tokens):
        from vllm_spec_plugins.tree import union_loops

        found = union_loops.forest_odds(tokens.numpy(), parents.numpy(), chance.numpy(), source.numpy(), MOST)
        return torch.from_numpy(found)
    if kernels_for(tokens):
        from vllm_spec_plugins.kernels import union as kernel

        return kernel.forest_odds(tokens, parents, chance, source, MOST)
    above = pad(chance, (1, 0), value=1.0).gather(1, parents)
    given = (chance / above).masked_fill((above <= 0) | (tokens < 0), 0.0)
    # Sums over masks, not scattered ones: those of a GPU add up in any order, and ranks must agree to the last bit.
    beside = (parents.unsqueeze(2) == parents.unsqueeze(1)) & (source.unsqueeze(1) == source)  # [B, M, M]
    return given / (1.0 - (beside * given.unsqueeze(1)).sum(2).clamp(max=MOST))


def union(forest: Forest, weights: Tensor, nodes: int, limit: int | None = None, least: float = 0.0) -> TokenTree:
    """The best tree that the sources' trees make together.

    Nodes of equal paths become one. As in `builders.trie`, sources are taken for independent evidence: where several have
    the path to a place, a token's chance there is its share of the odds,

        sum(w * odds of the sources that propose it) / (1 + sum(w * odds of all that any of them proposes there)),

    and a node's chance is the product along its path. So agreement raises a chance, rivals lower each other's, the
    children of a node never add up to more than 1, and a source alone with w = 1 gets back the chances that it gave.

    Args:
        forest: the sources' trees.
        weights: [B, S] float64, w: factor on each source's odds.
        nodes: N, the shape of the result.
        limit: at most this many nodes are present, those with the largest chances; None = `nodes`.
        least: the smallest chance worth a node.

    Nodes stand in the forest's order: the first source's before those that only a later one has.
    """
    cap = nodes if limit is None else min(limit, nodes)
    deepest = min(forest.max_depth, nodes)
    if loops_for(forest.tokens):
        from vllm_spec_plugins.tree import union_loops

        given = forest.tokens.numpy(), forest.parents.numpy(), forest.odds.numpy(), forest.source.numpy()
        tokens, parents, chances = map(torch.from_numpy, union_loops.union(*given, weights.numpy(), nodes, cap, least))
        return TokenTree(tokens, parents, deepest, chance=chances)
    if kernels_for(forest.tokens):
        from vllm_spec_plugins.kernels import union as kernel

        trees = forest.tokens, forest.parents, forest.odds, forest.source
        tokens, parents, chances = kernel.union(*trees, weights.contiguous(), nodes, cap, least, forest.max_depth)
        return TokenTree(tokens, parents, deepest, chance=chances)
    up = pad(forest.parents, (1, 0))  # [B, M + 1], rows; the root is its own parent
    same = _equal_paths(pad(forest.tokens, (1, 0), value=-2), up, forest.max_depth)
    odds = pad(forest.odds * weights[:, forest.source], (1, 0)).unsqueeze(1)
    together = _at(same, up)  # rows whose parents are one node
    share = (same * odds).sum(2) / (1.0 + (together * odds).sum(2))
    share[:, 0] = 1.0
    chance = _product_to_root(share, up, forest.max_depth)

    first = same.int().argmax(2)  # [B, M + 1], the row that stands for all of its path
    rows = torch.arange(first.shape[1], device=first.device)
    owner = (first == rows) & (pad(forest.tokens, (1, 0), value=-1) >= 0)
    value = chance.masked_fill(~owner, -1.0)
    kept = torch.zeros_like(owner)
    # A stable sort: of equals the one that stands first is taken, and ancestors stand first.
    kept.scatter_(1, value.argsort(stable=True, dim=1, descending=True)[:, :cap], True)
    kept &= value >= max(least, 0.0)
    row = kept.cumsum(1)
    place = (row - 1).masked_fill(~kept, nodes)
    out = torch.stack((pad(forest.tokens, (1, 0), value=-1), row.gather(1, first.gather(1, up))))
    empty = out.new_zeros(2, len(row), nodes + 1)
    empty[0].fill_(-1)
    out = empty.scatter_(2, place.expand(2, -1, -1), out)
    return TokenTree(out[0, :, :nodes], out[1, :, :nodes], deepest, chance=placed(chance, place, nodes))


def _at(pairs: Tensor, up: Tensor) -> Tensor:
    """pairs[b, up[b, i], up[b, j]]: [B, R, R] of [B, R, R] and [B, R]."""
    count = up.shape[1]
    of_rows = pairs.gather(1, up.unsqueeze(2).expand(-1, -1, count))
    return of_rows.gather(2, up.unsqueeze(1).expand(-1, count, -1))


def _equal_paths(tokens: Tensor, up: Tensor, max_depth: int) -> Tensor:
    """[B, R, R]: whether rows i and j have the same tokens on their ways to the root. The root's own is unlike all others.

    Each round compares twice as long a part of the ways, and jumps twice as far.
    """
    same = tokens.unsqueeze(2) == tokens.unsqueeze(1)
    for _ in range(max_depth.bit_length()):
        same = same & _at(same, up)
        up = up.gather(1, up)
    return same


def _product_to_root(values: Tensor, up: Tensor, max_depth: int) -> Tensor:
    """[B, R]: the product of `values` on each row's way to the root, whose own is 1."""
    for _ in range(max_depth.bit_length()):
        values = values * values.gather(1, up)
        up = up.gather(1, up)
    return values
