# SPDX-License-Identifier: Apache-2.0
"""N-grams merged into a tree on the device: `trie` is `tree.builders.trie` with odds, and `tree.loops.trie`.

The plain version is the tensor code there: some 35 launches, with intermediates of size [B, G, G, L].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_spec_plugins.kernels.selection import bits_of, digit_for, kth_largest, store_tree


@triton.jit(do_not_specialize=["limit", "least_bits"])
def _trie_kernel(
    ngrams_ptr,
    odds_ptr,
    tokens_ptr,
    parents_ptr,
    chance_ptr,
    count,
    length,
    nodes,
    limit,
    least_bits,
    BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIGIT: tl.constexpr,
):
    # Step by step along the n-grams; in a step all pairs of them at once: [G, G] in registers tells who shares a prefix.
    # The L steps depend on each other: each is two loads and three sums of a row, far less than one launch.
    request = tl.program_id(0).to(tl.int64)
    ngrams_ptr += request * count * length
    odds_ptr += request * count * length
    g, h = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_G)[None, :]
    own = tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK_L)[None, :]
    same = (g < count) & (h < count)
    so_far = tl.full([BLOCK_G], 1.0, tl.float64)
    owner = tl.zeros([BLOCK_G], tl.int32)
    bits = tl.full([BLOCK_G, BLOCK_L], -1, tl.int64)
    above = tl.full([BLOCK_G, BLOCK_L], -1, tl.int32)  # the node that the prefix ends in, g * BLOCK_L + l
    for step in range(length):
        mine = tl.load(ngrams_ptr + g * length + step, mask=g < count, other=-1)
        theirs = tl.load(ngrams_ptr + h * length + step, mask=h < count, other=-1)
        odds = tl.load(odds_ptr + h * length + step, mask=theirs >= 0, other=0.0).to(tl.float64)
        siblings = tl.sum(tl.where(same, odds, 0.0), 1)
        same = same & (mine == theirs)
        so_far *= tl.sum(tl.where(same, odds, 0.0), 1) / (1.0 + siblings)
        if step > 0:
            above = tl.where(place == step, (owner * BLOCK_L + step - 1)[:, None], above)
        owner = tl.min(tl.where(same, h, BLOCK_G - 1), 1)
        here = (owner == own)[:, None] & (mine >= 0)
        bits = tl.where((place == step) & here, so_far.to(tl.int64, bitcast=True)[:, None], bits)

    # The limit-th largest is the least that is kept; of equals those of the first n-grams, as far as there is room.
    bits, above = tl.reshape(bits, [BLOCK_G * BLOCK_L]), tl.reshape(above, [BLOCK_G * BLOCK_L])
    floor = tl.maximum(kth_largest(bits, limit, DIGIT), least_bits)
    row = tl.cumsum((bits >= floor).to(tl.int32))
    kept = (bits >= floor) & (row <= limit)
    parent = tl.where(above >= 0, tl.gather(row, tl.maximum(above, 0), 0), 0)
    node = tl.arange(0, BLOCK_G * BLOCK_L)
    token = tl.load(ngrams_ptr + node // BLOCK_L * length + node % BLOCK_L, mask=kept, other=-1)
    chance = bits.to(tl.float64, bitcast=True)
    tokens_ptr += request * nodes
    parents_ptr += request * nodes
    chance_ptr += request * nodes
    store_tree(tokens_ptr, parents_ptr, chance_ptr, row - 1, kept, token, parent, chance, nodes, BLOCK_N)


def trie(
    ngrams: Tensor,
    nodes: int,
    limit: int,
    odds: Tensor,
    least: float,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best tree of n-grams that may follow the root, under a budget, as `tree.loops.trie`.

    Args:
        ngrams: [B, G, L] int64, -1 behind the end of a shorter n-gram.
        nodes: N, the shape of the result.
        limit: at most this many nodes are present.
        odds: [B, G, L] float32 or float64, c / (1 - c) with c the chance of each token.
        least: the smallest chance worth a node.
        out: what is returned, to be written.

    Returns:
        tokens int64, parents int64 and chances float64, [B, N].

    Traffic: B * G * L * (8 + size of an odds) bytes read, 24 * B * N written.
    """
    batch, count, length = ngrams.shape
    assert ngrams.is_contiguous() and ngrams.dtype == torch.int64
    assert odds.shape == ngrams.shape and odds.is_contiguous()
    found = tree_memory(batch, nodes, torch.float64, ngrams.device, out)
    if batch and nodes:
        block_g, block_l = triton.next_power_of_2(max(count, 1)), triton.next_power_of_2(max(length, 1))
        warps = max(1, min(8, block_g * max(block_g, block_l) // 128))
        _trie_kernel[(batch,)](
            ngrams,
            odds,
            *found,
            count,
            length,
            nodes,
            min(limit, nodes),
            bits_of(least),
            block_g,
            block_l,
            triton.next_power_of_2(nodes),
            digit_for(block_g * block_l, warps),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return found


def tree_memory(
    batch: int, nodes: int, chance: torch.dtype, device: torch.device, out: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`out`, checked, or memory for the tokens, parents and chances [B, N] of trees."""
    shape = (batch, nodes)
    if out is None:
        tokens, parents = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
        return tokens, parents, torch.empty(shape, dtype=chance, device=device)
    for each, dtype in zip(out, (torch.int64, torch.int64, chance), strict=True):
        assert each.shape == shape and each.dtype == dtype and each.is_contiguous()
    return out
