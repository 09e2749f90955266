# SPDX-License-Identifier: Apache-2.0
"""Builders: token trees from chains, fixed shapes and sets of n-grams."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_spec_plugins.tree.tree import TokenTree


def chain(tokens: Tensor) -> TokenTree:
    """A chain: each node is the child of the one before it.

    Args:
        tokens: [B, N] int64, -1 behind the end of a shorter chain.
    """
    rows = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TokenTree(tokens, rows.masked_fill(tokens < 0, 0))


def trie(
    ngrams: Tensor, nodes: int, limit: int | None = None, chance: Tensor | None = None, least: float = 0.0
) -> TokenTree:
    """Merge n-grams that may follow the root into one tree, sharing equal prefixes.

    Node (g, l) is kept when no earlier n-gram has the same first l + 1 tokens. N-gram-major order is
    ancestors-first. Without `chance`, what exceeds the budget is cut from the last n-grams: put the best first. With
    it, the tree is the best one under the budget: the nodes with the largest product of chances along their paths,
    each chance being reduced by those of the siblings before it, and none below `least`.

    Args:
        ngrams: [B, G, L] int64, -1 behind the end of a shorter n-gram.
        nodes: N, the shape of the result.
        limit: at most this many nodes are present; None = `nodes`.
        chance: [B, G, L] float below 1: that the token is the target's draw, given that those before it are.
        least: a node's product must reach this.
    """
    batch, count, length = ngrams.shape
    cap = nodes if limit is None else min(limit, nodes)
    same = (ngrams.unsqueeze(2) == ngrams.unsqueeze(1)).cumprod(-1)  # [B, G, G, L]: equal up to and including l
    first = same.argmax(2)  # [B, G, L]: the n-gram that owns the node (itself at the latest)
    owner = (first == _column(count, ngrams.device)) & (ngrams >= 0)
    kept = owner
    if chance is not None and cap > 0:
        product = _path_chance(chance * owner, same, first).masked_fill(~owner, -1.0)
        if count * length > cap:
            worst = product.view(batch, -1).topk(cap, 1).values[:, -1].clamp(min=least).view(batch, 1, 1)
            kept = product >= worst
        else:
            kept = product >= least
    row = kept.view(batch, -1).cumsum(1)  # [B, G * L]: row of a kept node
    # Row of the prefix that ends at (g, l), looked up at its owner; the parent of (g, l + 1).
    prefix_row = row.view(batch, count, length).gather(1, first)
    parents = torch.nn.functional.pad(prefix_row[:, :, :-1], (1, 0)).view(batch, -1)
    place = (row - 1).masked_fill(~kept.view(batch, -1) | (row > cap), nodes)  # column `nodes` is cut off
    out = ngrams.new_zeros(2, batch, nodes + 1)
    out[0].fill_(-1)
    out.scatter_(2, place.expand(2, -1, -1), torch.stack((ngrams.view(batch, -1), parents)))
    return TokenTree(out[0, :, :nodes], out[1, :, :nodes], min(length, nodes))


@lru_cache(maxsize=32)
def _column(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device).view(1, count, 1)


@lru_cache(maxsize=32)
def _before(count: int, device: torch.device) -> Tensor:
    """[1, G, G, 1]: 1 where the second n-gram comes before the first."""
    return torch.ones(count, count, device=device).tril(-1).view(1, count, count, 1)


def _path_chance(chance: Tensor, same: Tensor, first: Tensor) -> Tensor:
    """[B, G, L]: product of chances from the root to each node; siblings share what those before them leave.

    Args:
        chance: [B, G, L], 0 where the n-gram does not own the node.
        same, first: as in `trie`.
    """
    # Owned by an earlier n-gram and below the same parent, the prefix before l.
    sibling = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1) * _before(same.shape[1], same.device)
    taken = (sibling * chance.unsqueeze(1)).sum(2)
    return (chance * (1 - taken).clamp_(min=0)).gather(1, first).cumprod(-1)


def append(first: TokenTree, tokens: Tensor, parents: Tensor, max_depth: int) -> TokenTree:
    """Hang a second part of fixed layout under the root of `first`, right behind its last node.

    Args:
        first: [B, T] trees.
        tokens: [B, M] int64 tokens of the second part, -1 at the end only.
        parents: [M] int64, as rows of the second part alone (0 = root).
        max_depth: depth of the second part.

    Returns:
        [B, T + M] trees; row r > 0 of the second part is row r + first.num_nodes.
    """
    start = first.num_nodes.unsqueeze(1)
    width = tokens.shape[1]
    place = start + torch.arange(width, device=tokens.device)
    moved = (parents + start * (parents > 0)).masked_fill(tokens < 0, 0)
    return TokenTree(
        torch.nn.functional.pad(first.tokens, (0, width), value=-1).scatter_(1, place, tokens),
        torch.nn.functional.pad(first.parents, (0, width)).scatter_(1, place, moved),
        max(first.max_depth, max_depth),
    )
