# SPDX-License-Identifier: Apache-2.0
"""Builders: token trees from chains, fixed shapes and sets of n-grams."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.tree.topology import Topology
from vllm_spec_plugins.tree.tree import TokenTree


def chain(tokens: Tensor) -> TokenTree:
    """A chain: each node is the child of the one before it.

    Args:
        tokens: [B, N] int64, -1 behind the end of a shorter chain.
    """
    rows = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TokenTree(tokens, rows.masked_fill(tokens < 0, 0))


def trie(
    ngrams: Tensor, nodes: int, limit: int | None = None, odds: Tensor | None = None, least: float = 0.0
) -> TokenTree:
    """Merge n-grams that may follow the root into one tree, sharing equal prefixes.

    Node (g, l) is kept when no earlier n-gram has the same first l + 1 tokens. N-gram-major order is
    ancestors-first. Without `odds`, what exceeds the budget is cut from the last n-grams. With them, the tree is the
    best one under the budget: the nodes with the largest chance to be accepted, none below `least`.

    N-grams are taken for independent evidence: of those that agree on everything before a place, each token gets its
    share of the odds, sum(odds of the n-grams that have it) / (1 + sum(odds of all)). A node's chance is the product
    along its path.

    Args:
        ngrams: [B, G, L] int64, -1 behind the end of a shorter n-gram.
        nodes: N, the shape of the result.
        limit: at most this many nodes are present; None = `nodes`.
        odds: [B, G, L] float, c / (1 - c) with c the chance that the token is right if those before it are; the
            result's `chance` is made of them.
        least: the smallest chance worth a node.
    """
    batch, count, length = ngrams.shape
    cap = nodes if limit is None else min(limit, nodes)
    if odds is not None and loops_for(ngrams):
        from vllm_spec_plugins.tree import loops

        grown = loops.trie(ngrams.numpy(), nodes, cap, odds.double().numpy(), least)
        tokens, links, chances = map(torch.from_numpy, grown)
        return TokenTree(tokens, links, min(length, nodes), chance=chances)
    if odds is not None and kernels_for(ngrams):
        from vllm_spec_plugins.kernels import trie as kernel

        tokens, links, chances = kernel.trie(ngrams.contiguous(), nodes, cap, odds.contiguous(), least)
        return TokenTree(tokens, links, min(length, nodes), chance=chances)
    same = (ngrams.unsqueeze(2) == ngrams.unsqueeze(1)).cumprod(-1)  # [B, G, G, L]: equal up to and including l
    first = same.argmax(2)  # [B, G, L]: the n-gram that owns the node (itself at the latest)
    exists = ngrams >= 0
    kept = exists & (first == _column(count, ngrams.device))
    chance: Tensor | None = None
    if odds is not None:
        chance = _path_chance(odds * exists, same).masked_fill(~kept, -1.0)
        if count * length > cap > 0:
            least_kept = chance.view(batch, -1).topk(cap, 1).values[:, -1].clamp(min=least).view(batch, 1, 1)
            kept = chance >= least_kept
        else:
            kept = chance >= least
    row = kept.view(batch, -1).cumsum(1)  # [B, G * L]: row of a kept node
    # Row of the prefix that ends at (g, l), looked up at its owner; the parent of (g, l + 1).
    prefix_row = row.view(batch, count, length).gather(1, first)
    parents = pad(prefix_row[:, :, :-1], (1, 0)).view(batch, -1)
    place = (row - 1).masked_fill(~kept.view(batch, -1) | (row > cap), nodes)  # column `nodes` is cut off
    out = ngrams.new_zeros(2, batch, nodes + 1)
    out[0].fill_(-1)
    out.scatter_(2, place.expand(2, -1, -1), torch.stack((ngrams.view(batch, -1), parents)))
    if chance is not None:
        chance = placed(chance.view(batch, -1), place, nodes)
    return TokenTree(out[0, :, :nodes], out[1, :, :nodes], min(length, nodes), chance=chance)


def placed(chance: Tensor, place: Tensor, nodes: int) -> Tensor:
    """[B, nodes]: each chance at its node's place; what has the place `nodes` is left out."""
    return chance.new_zeros(len(chance), nodes + 1).scatter_(1, place, chance)[:, :nodes]


@dataclass(frozen=True, eq=False)
class _Paths:
    """Nodes as paths of ranks: C of them, ancestors first.

    Attributes:
        ranks: [C, D] int64, rank at each depth of the path; 0 behind the node's own depth.
        on_path: [C, D] bool, the depths of the path.
        depth: [C] int64, of the node, 0-based.
        parent: [C] int64, index of the parent plus 1; 0 = root.
        last: [C] int64, the node's own rank.
    """

    ranks: Tensor
    on_path: Tensor
    depth: Tensor
    parent: Tensor
    last: Tensor

    @classmethod
    def of(cls, paths: Iterable[tuple[int, ...]], depth: int, device: torch.device) -> _Paths:
        rest = list(paths)
        place = {path: index + 1 for index, path in enumerate(rest)}
        length = torch.tensor([len(path) for path in rest], device=device)
        return cls(
            torch.tensor([[*path, *[0] * (depth - len(path))] for path in rest], device=device),
            torch.arange(depth, device=device) < length.unsqueeze(1),
            length - 1,
            torch.tensor([place.get(path[:-1], 0) for path in rest], device=device),
            torch.tensor([path[-1] for path in rest], device=device),
        )

    def chance(self, chance: Tensor) -> Tensor:
        """[B, C]: product along each path of chance [B, >= D, K], multiplied from the root down."""
        every = chance[:, torch.arange(self.ranks.shape[1], device=chance.device), self.ranks]  # [B, C, D]
        return reduce(torch.mul, every.masked_fill(~self.on_path, 1.0).unbind(2))

    def tokens(self, candidates: Tensor) -> Tensor:
        """[B, C]: each node's own candidate of [B, >= D, K]."""
        return candidates.flatten(1)[:, self.depth * candidates.shape[2] + self.last]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """depth, last and parent, for the loops."""
        return self.depth.numpy(), self.last.numpy(), self.parent.numpy()


@lru_cache(maxsize=16)
def _products(depth: int, ranks: int, nodes: int, device: torch.device) -> _Paths:
    """All products of ranks that can be among the N best.

    Those whose candidates of better ranks, and their ancestors, fit in `nodes`: a path of ranks r1 .. rd (from 0) has
    prod(r + 1) - 1 others of its length before it where chances fall with rank.
    """
    paths: list[tuple[int, ...]] = [()]
    for path in paths:
        if len(path) == depth:
            continue
        before = math.prod(rank + 1 for rank in path)
        paths.extend((*path, rank) for rank in range(ranks) if before * (rank + 1) + len(path) <= nodes)
    return _Paths.of(paths[1:], depth, device)


def ranked(candidates: Tensor, chance: Tensor, nodes: int, limit: int, least: float = 0.0) -> TokenTree:
    """The best tree of candidates that depend on their depth alone (Medusa heads), by the product of chances.

    Args:
        candidates: [B, D, K] int64, the tokens that may stand at each depth, the most likely first.
        chance: [B, D, K] float, that a candidate is right if the path to it is; taken as falling with the rank.
        nodes: N, the shape of the result.
        limit: at most this many nodes are present, at most N.
        least: the smallest chance of a whole path that is worth a node.

    The result's `chance` are these products.
    """
    depth, ranks = candidates.shape[1:]
    table = _products(depth, ranks, nodes, candidates.device)
    if loops_for(candidates):
        from vllm_spec_plugins.tree import ranks_loops

        worth = chance.numpy().dtype.type(least)
        grown = ranks_loops.ranked(candidates.numpy(), chance.numpy(), *table.arrays(), nodes, limit, worth)
        tokens, links, chances = map(torch.from_numpy, grown)
        return TokenTree(tokens, links, min(depth, nodes), chance=chances)
    if kernels_for(candidates):
        from vllm_spec_plugins.kernels import growth

        if len(table.ranks) <= growth.MOST_PATHS:
            paths = table.ranks, table.depth, table.parent
            tokens, links, chances = growth.ranked(candidates, chance, *paths, nodes, limit, least)
            return TokenTree(tokens, links, min(depth, nodes), chance=chances)
    # A child is never more likely than its parent, nor a rank than a better one.
    product = table.chance(chance.cummin(2).values)
    count = min(limit, product.shape[1])
    kept = torch.zeros_like(product, dtype=torch.bool)
    if count:
        # A stable sort: of equals the one that stands first is taken, and ancestors stand first.
        best = product.argsort(stable=True, dim=1, descending=True)[:, :count]
        kept.scatter_(1, best, True)
    kept &= product >= least
    row = kept.cumsum(1)  # [B, C], the row of a kept node
    place = (row - 1).masked_fill(~kept, nodes)
    parents = pad(row, (1, 0))[:, table.parent]
    out = candidates.new_zeros(2, len(candidates), nodes + 1)
    out[0].fill_(-1)
    out.scatter_(2, place.expand(2, -1, -1), torch.stack((table.tokens(candidates), parents)))
    chances = placed(product, place, nodes)
    return TokenTree(out[0, :, :nodes], out[1, :, :nodes], min(depth, nodes), chance=chances)


@lru_cache(maxsize=4)
def _paths_of(topology: Topology, device: torch.device) -> _Paths:
    rows: list[tuple[int, ...]] = [()]
    for parent, rank in zip(topology.parents, topology.ranks, strict=True):
        rows.append((*rows[parent], rank))
    return _Paths.of(rows[1:], topology.max_depth, device)


def chosen(topology: Topology, candidates: Tensor, chance: Tensor, limit: int) -> TokenTree:
    """The tree of a fixed shape: candidate `ranks[j]` of depth `depths[j]` at node j.

    Args:
        topology: of N nodes.
        candidates: [B, D, K] int64, the tokens that may stand at each depth, the most likely first.
        chance: [B, D, K] float, that a candidate is right if the path to it is.
        limit: at most this many nodes are present, the first ones.

    The result's `chance` are the products along the paths.
    """
    table = _paths_of(topology, candidates.device)
    if loops_for(candidates):
        from vllm_spec_plugins.tree import ranks_loops

        cut = ranks_loops.chosen(candidates.numpy(), chance.numpy(), *table.arrays(), limit)
        tokens, links, chances = map(torch.from_numpy, cut)
        return TokenTree(tokens, links, topology.max_depth, chance=chances)
    if kernels_for(candidates):
        from vllm_spec_plugins.kernels import growth

        if len(table.ranks) <= growth.MOST_PATHS:
            paths = table.ranks, table.depth, table.parent
            tokens, links, chances = growth.chosen(candidates, chance, *paths, limit)
            return TokenTree(tokens, links, topology.max_depth, chance=chances)
    tree = replace(topology.tree(table.tokens(candidates)), chance=table.chance(chance))
    return tree.truncate(limit)


@lru_cache(maxsize=32)
def _column(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device).view(1, count, 1)


def _path_chance(odds: Tensor, same: Tensor) -> Tensor:
    """[B, G, L]: the chance that the whole of each prefix is right; `odds` and `same` as in `trie`."""
    odds = odds.unsqueeze(1)
    agree = (same * odds).sum(2)
    siblings = (pad(same[..., :-1], (1, 0), value=1) * odds).sum(2)
    return (agree / (1 + siblings)).cumprod(-1)


def append(first: TokenTree, tokens: Tensor, parents: Tensor, max_depth: int) -> TokenTree:
    """Hang a second part of fixed layout under the root of `first`, right behind its last node.

    Args:
        first: [B, T] trees.
        tokens: [B, M] int64 tokens of the second part, -1 at the end only.
        parents: [M] int64, as rows of the second part alone (0 = root).
        max_depth: depth of the second part.

    Returns:
        [B, T + M] trees; row r > 0 of the second part is row r + first.num_nodes. `gain` is that of `first`, and
        the second part's chances are 0.
    """
    start = first.num_nodes.unsqueeze(1)
    width = tokens.shape[1]
    place = start + torch.arange(width, device=tokens.device)
    moved = (parents + start * (parents > 0)).masked_fill(tokens < 0, 0)
    return TokenTree(
        pad(first.tokens, (0, width), value=-1).scatter_(1, place, tokens),
        pad(first.parents, (0, width)).scatter_(1, place, moved),
        max(first.max_depth, max_depth),
        first.gain,
        None if first.chance is None else pad(first.chance, (0, width)),
    )
