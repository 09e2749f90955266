# SPDX-License-Identifier: Apache-2.0
"""One tree from the trees of several sources on the device, a program per request.

`forest_odds` is `tree.union._odds` (and that of `tree.union_loops`), `union` is `tree.union.union` (and that of
`tree.union_loops`) with the fields of the forest in its place. The plain versions are these: some 60 launches for a union
in tensors, whose intermediates are of size [B, M + 1, M + 1].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_spec_plugins.kernels.selection import best, bits_of, digit_for, store_tree
from vllm_spec_plugins.kernels.trie import tree_memory


@triton.jit
def _odds_kernel(tokens_ptr, parents_ptr, chance_ptr, source_ptr, odds_ptr, nodes, most_bits, BLOCK_M: tl.constexpr):
    # Sums go from the first node to the last, as in the loop: equal trees get equal odds. A round is four scalar loads
    # from the cache and an addition; M of them take less than the launches for a [M, M] mask and its sum.
    request = tl.program_id(0).to(tl.int64)
    tokens_ptr += request * nodes
    parents_ptr += request * nodes
    chance_ptr += request * nodes
    node = tl.arange(0, BLOCK_M)
    there = node < nodes
    parent = tl.load(parents_ptr + node, mask=there, other=-1)
    source = tl.load(source_ptr + node, mask=there, other=-1)
    total = tl.zeros([BLOCK_M], tl.float64)
    for other in range(nodes):
        up = tl.load(parents_ptr + other)
        above = tl.load(chance_ptr + up - 1, mask=up > 0, other=1.0)
        present = (tl.load(tokens_ptr + other) >= 0) & (above > 0.0)
        given = tl.where(present, tl.load(chance_ptr + other) / tl.where(present, above, 1.0), 0.0)
        total += tl.where((parent == up) & (source == tl.load(source_ptr + other)), given, 0.0)
    above = tl.load(chance_ptr + parent - 1, mask=there & (parent > 0), other=1.0)
    present = (tl.load(tokens_ptr + node, mask=there, other=-1) >= 0) & (above > 0.0)
    chance = tl.load(chance_ptr + node, mask=there, other=0.0)
    most = most_bits.to(tl.int64).to(tl.float64, bitcast=True)
    odds = chance / tl.where(present, above, 1.0) / (1.0 - tl.minimum(total, most))
    tl.store(odds_ptr + request * nodes + node, tl.where(present, odds, 0.0), mask=there)


def forest_odds(
    tokens: Tensor, parents: Tensor, chance: Tensor, source: Tensor, most: float, out: Tensor | None = None
) -> Tensor:
    """[B, M] float64: `Forest.odds` from path chances.

    Args:
        tokens, parents: [B, M] int64, a forest; chance: [B, M] float64; source: [M] int64.
        most: the children of one node are never right with more than this chance.
        out: what is returned, to be written.

    Traffic: 24 * B * M bytes read, 8 * B * M written.
    """
    batch, nodes = _forest(tokens, parents, chance, source)
    odds = torch.empty_like(chance) if out is None else out
    assert odds.shape == chance.shape and odds.dtype == torch.float64 and odds.is_contiguous()
    if batch and nodes:
        block = triton.next_power_of_2(nodes)
        given = tokens, parents, chance, source, odds, nodes, bits_of(most)
        _odds_kernel[(batch,)](*given, block, num_warps=max(1, min(4, block // 64)), enable_fp_fusion=False)
    return odds


@triton.jit(do_not_specialize=["limit", "least_bits"])
def _union_kernel(
    tokens_ptr,
    parents_ptr,
    odds_ptr,
    source_ptr,
    weights_ptr,
    out_tokens_ptr,
    out_parents_ptr,
    out_chance_ptr,
    many,
    sources,
    nodes,
    limit,
    least_bits,
    max_depth,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIGIT: tl.constexpr,
):
    # Rows 0 (the root) to M in registers. A node's path is its parent's and its token, so nodes are named one after the
    # other by the first row of their path: M rounds of two sums and a minimum of a vector in a warp or two. In tensors
    # it is log2(depth) rounds of launches over [M, M], and there is no order in which to add the odds.
    request = tl.program_id(0).to(tl.int64)
    tokens_ptr += request * many
    parents_ptr += request * many
    row = tl.arange(0, BLOCK_R)
    node = (row > 0) & (row <= many)
    token = tl.load(tokens_ptr + row - 1, mask=node, other=-1)
    same = tl.where(row == 0, 0, row)
    above = tl.full([BLOCK_R], -1, tl.int32)
    agree = tl.zeros([BLOCK_R], tl.float64)
    total = tl.zeros([BLOCK_R], tl.float64)
    for at in range(1, many + 1):
        here = tl.load(tokens_ptr + at - 1)
        if here >= 0:
            up = tl.sum(tl.where(row == tl.load(parents_ptr + at - 1), same, 0))
            alike = (token == here) & (above == up) & (row < at)
            first = tl.minimum(tl.min(tl.where(alike, row, BLOCK_R)), at)
            weight = tl.load(weights_ptr + request * sources + tl.load(source_ptr + at - 1))
            odds = tl.load(odds_ptr + request * many + at - 1) * weight
            same = tl.where(row == at, first, same)
            above = tl.where(row == at, up, above)
            agree += tl.where(row == first, odds, 0.0)
            total += tl.where(row == up, odds, 0.0)

    # Chances from the root down: a round more, and one level more is right.
    up = tl.maximum(above, 0)
    share = agree / (1.0 + tl.gather(total, up, 0))
    chance = tl.full([BLOCK_R], 1.0, tl.float64)
    for _ in range(max_depth):
        chance = tl.where(row == 0, 1.0, tl.gather(chance, up, 0) * share)
    bits = tl.where(node & (token >= 0) & (same == row), chance.to(tl.int64, bitcast=True), -1)
    kept = best(bits, limit, least_bits, DIGIT)
    place = tl.cumsum(kept.to(tl.int32))
    parent = tl.gather(place, up, 0)
    out_tokens_ptr += request * nodes
    out_parents_ptr += request * nodes
    out_chance_ptr += request * nodes
    store_tree(out_tokens_ptr, out_parents_ptr, out_chance_ptr, place - 1, kept, token, parent, chance, nodes, BLOCK_N)


def union(
    tokens: Tensor,
    parents: Tensor,
    odds: Tensor,
    source: Tensor,
    weights: Tensor,
    nodes: int,
    limit: int,
    least: float,
    max_depth: int,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best tree that the sources' trees make together, under a budget.

    Args:
        tokens, parents: [B, M] int64, odds: [B, M] float64, source: [M] int64, max_depth: those of the `Forest`.
        weights: [B, S] float64, factor on each source's odds.
        nodes: N, the shape of the result; limit: at most this many nodes are present.
        least: the smallest chance worth a node.
        out: what is returned, to be written.

    Returns:
        tokens int64, parents int64 and chances float64, [B, N].

    Traffic: 24 * B * M bytes read, 24 * B * N written.
    """
    batch, many = _forest(tokens, parents, odds, source)
    assert weights.dim() == 2 and weights.is_contiguous() and weights.dtype == torch.float64 and len(weights) == batch
    found = tree_memory(batch, nodes, torch.float64, tokens.device, out)
    if batch and nodes:
        block = triton.next_power_of_2(many + 1)
        warps = max(1, min(8, block // 64))
        _union_kernel[(batch,)](
            tokens,
            parents,
            odds,
            source,
            weights,
            *found,
            many,
            weights.shape[1],
            nodes,
            min(limit, nodes),
            bits_of(least),
            max_depth,
            block,
            triton.next_power_of_2(nodes),
            digit_for(block, warps),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return found


def _forest(tokens: Tensor, parents: Tensor, values: Tensor, source: Tensor) -> tuple[int, int]:
    """B and M."""
    batch, nodes = tokens.shape
    for each, dtype in ((tokens, torch.int64), (parents, torch.int64), (values, torch.float64)):
        assert each.shape == (batch, nodes) and each.is_contiguous() and each.dtype == dtype
    assert source.shape == (nodes,) and source.is_contiguous() and source.dtype == torch.int64
    return batch, nodes
