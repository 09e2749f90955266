# SPDX-License-Identifier: Apache-2.0
"""Trees grown from ranked candidates on the device, a program per request.

`ranked` and `chosen` are those of `tree.builders` (and of `tree.ranks_loops`), for Medusa heads; the tables `ranks`,
`depth` and `parent` are those of its `_Paths`. `expand`, `adopt` and `likeliest_nodes` are those of `proposers.loops`,
for a draft model's levels: a level has a fixed number of rows per request, -1 where there is none, so nothing has to be
asked of the device between the levels. `likeliest_nodes` is `proposers.specinfer._best` too, with `count` full.

The plain versions are those functions: 15 to 30 launches each in tensors.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_spec_plugins.kernels.selection import best, bits_of, digit_for, store_tree
from vllm_spec_plugins.kernels.trie import tree_memory

# Paths of ranks that `ranked` chooses among in registers. The default settings of Medusa make 224, 64 nodes 1114; where a
# table is larger than this, its tensor code has to do.
MOST_PATHS = 4096


@triton.jit(do_not_specialize=["limit", "least_bits"])
def _ranked_kernel(
    candidates_ptr,
    chance_ptr,
    ranks_ptr,
    depth_ptr,
    parent_ptr,
    tokens_ptr,
    parents_ptr,
    out_ptr,
    count,
    deepest,
    per_depth,
    nodes,
    limit,
    least_bits,
    FIXED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIGIT: tl.constexpr,
):
    # D * K short rounds make every path's product at once: a scalar load and four operations on the vector each.
    request = tl.program_id(0).to(tl.int64)
    chance_ptr += request * deepest * per_depth
    candidates_ptr += request * deepest * per_depth
    path = tl.arange(0, BLOCK_C)
    there = path < count
    depth = tl.load(depth_ptr + path, mask=there, other=-1).to(tl.int32)
    product = tl.full([BLOCK_C], 1.0, tl.float32)
    for deep in range(deepest):
        rank = tl.load(ranks_ptr + path * deepest + deep, mask=there, other=0).to(tl.int32)
        factor = tl.full([BLOCK_C], float("inf"), tl.float32)
        for other in range(per_depth):
            given = tl.load(chance_ptr + deep * per_depth + other)
            if FIXED:
                factor = tl.where(rank == other, given, factor)
            else:  # a child is never more likely than a rank better than its own
                factor = tl.where(rank >= other, tl.minimum(given, factor), factor)
        product = tl.where(depth >= deep, product * factor, product)
    last = tl.load(ranks_ptr + path * deepest + depth, mask=there, other=0)
    token = tl.load(candidates_ptr + depth * per_depth + last, mask=there, other=-1)
    parent = tl.load(parent_ptr + path, mask=there, other=0).to(tl.int32)
    if FIXED:
        kept = there & (path < limit)
        row = path + 1
    else:
        bits = product.to(tl.float64).to(tl.int64, bitcast=True)
        kept = best(tl.where(there, bits, -1), limit, least_bits, DIGIT)
        row = tl.cumsum(kept.to(tl.int32))
        parent = tl.where(parent > 0, tl.gather(row, tl.maximum(parent - 1, 0), 0), 0)
    tokens_ptr += request * nodes
    parents_ptr += request * nodes
    out_ptr += request * nodes
    store_tree(tokens_ptr, parents_ptr, out_ptr, row - 1, kept, token, parent, product, nodes, BLOCK_N)


def ranked(
    candidates: Tensor,
    chance: Tensor,
    ranks: Tensor,
    depth: Tensor,
    parent: Tensor,
    nodes: int,
    limit: int,
    least: float,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best tree of candidates that depend on their depth alone, by the product of chances.

    Args:
        candidates: [B, D, K] int64; chance: [B, D, K] float32, in [0, 1].
        ranks: [C, D] int64, depth (0-based) and parent (from 1; 0 = root): [C] int64, of the paths that can be among the
            best, ancestors first.
        nodes: N, the shape of the result; limit: at most this many nodes are present, at most N.
        least: the smallest chance of a path that is worth a node; it counts as a float32.
        out: what is returned, to be written.

    Returns:
        tokens int64, parents int64 and chances float32, [B, N].

    Traffic: 12 * B * D * K + 8 * C * (D + 2) bytes read, 20 * B * N written.
    """
    least_bits = bits_of(float(np.float32(least)))
    return _grown(candidates, chance, (ranks, depth, parent), nodes, min(limit, nodes), least_bits, False, out)


def chosen(
    candidates: Tensor,
    chance: Tensor,
    ranks: Tensor,
    depth: Tensor,
    parent: Tensor,
    limit: int,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tree of a fixed shape of N nodes, whose paths are `ranks` [N, D]; otherwise as `ranked`."""
    nodes = len(ranks)
    return _grown(candidates, chance, (ranks, depth, parent), nodes, min(limit, nodes), 0, True, out)


def _grown(
    candidates: Tensor,
    chance: Tensor,
    table: tuple[Tensor, Tensor, Tensor],
    nodes: int,
    limit: int,
    least_bits: int,
    fixed: bool,
    out: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, deepest, per_depth = candidates.shape
    count = len(table[0])
    assert count <= MOST_PATHS
    assert candidates.is_contiguous() and candidates.dtype == torch.int64
    assert chance.shape == candidates.shape and chance.is_contiguous() and chance.dtype == torch.float32
    for each, shape in zip(table, ((count, deepest), (count,), (count,)), strict=True):
        assert each.shape == shape and each.is_contiguous() and each.dtype == torch.int64
    found = tree_memory(batch, nodes, torch.float32, candidates.device, out)
    if batch and nodes:
        block = triton.next_power_of_2(max(count, 1))
        warps = max(1, min(16, block // 64))
        _ranked_kernel[(batch,)](
            candidates,
            chance,
            *table,
            *found,
            count,
            deepest,
            per_depth,
            nodes,
            limit,
            least_bits,
            fixed,
            block,
            triton.next_power_of_2(nodes),
            digit_for(block, warps),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return found


@triton.jit
def _expand_kernel(
    chances_ptr,
    owners_ptr,
    tokens_ptr,
    start_ptr,
    count_ptr,
    drafted_ptr,
    parents_ptr,
    candidate_ptr,
    rows_ptr,
    added_ptr,
    candidates,
    width,
    most,
    least,
    BLOCK_C: tl.constexpr,
):
    # The best one, `most` times over: a level has few rows, and each round is one search for a maximum in registers.
    request = tl.program_id(0).to(tl.int64)
    start, count = tl.load(start_ptr + request), tl.load(count_ptr + request)
    rows = tl.load(rows_ptr + request)
    node = tl.arange(0, BLOCK_C)
    chance = tl.load(chances_ptr + request * candidates + node, mask=(node >= start) & (node < count), other=-1.0)
    chance = tl.where((chance >= least) & (chance > 0), chance, -1.0)
    room = tl.minimum(width - rows, most)
    added = tl.zeros([], tl.int64)
    for rank in range(most):
        largest = tl.max(chance)
        row = tl.full([], -1, tl.int64)
        if (largest > 0) & (rank < room):
            first = tl.min(tl.where(chance == largest, node, BLOCK_C))
            chance = tl.where(node == first, -1.0, chance)
            at = request * width + rows + added
            tl.store(drafted_ptr + at, tl.load(tokens_ptr + request * candidates + first))
            tl.store(parents_ptr + at, tl.load(owners_ptr + request * candidates + first))
            tl.store(candidate_ptr + at, first.to(tl.int64))
            added += 1
            row = rows + added
        tl.store(added_ptr + request * most + rank, row)
    tl.debug_barrier()
    tl.store(rows_ptr + request, rows + added)
    tl.store(start_ptr + request, count)


def expand(
    chances: Tensor,
    owners: Tensor,
    tokens: Tensor,
    start: Tensor,
    count: Tensor,
    most: int,
    least: float,
    drafted: Tensor,
    parents: Tensor,
    candidate: Tensor,
    rows: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Give the draft the best candidates of the last level, `most` per request, none below `least`.

    Args:
        chances, owners, tokens: [B, C] float32, int64, int64, candidates: chance of the path, row of the parent in the
            draft's tree, token.
        start, count: [B] int64, where the last level begins and how many candidates there are; `start` is moved behind.
        drafted, parents, candidate: [B, E] int64, the draft's trees and which candidate each of their rows is; written.
        rows: [B] int64, rows of each tree; written.
        out: what is returned, to be written.

    Returns:
        [B, most] int64, the rows added to each tree, the best first; -1 behind them.
    """
    batch, candidates = chances.shape
    _states(batch, candidates, (owners, tokens), chances)
    _states(batch, drafted.shape[1], (drafted, parents, candidate))
    _numbers(batch, start, count, rows)
    added = torch.empty(batch, most, dtype=torch.int64, device=chances.device) if out is None else out
    assert added.shape == (batch, most) and added.is_contiguous() and added.dtype == torch.int64
    if batch:
        block = triton.next_power_of_2(candidates)
        _expand_kernel[(batch,)](
            chances,
            owners,
            tokens,
            start,
            count,
            drafted,
            parents,
            candidate,
            rows,
            added,
            candidates,
            drafted.shape[1],
            most,
            least,
            block,
            num_warps=max(1, min(4, block // 256)),
        )
    return added


@triton.jit
def _adopt_kernel(
    row_ptr,
    found_ptr,
    scores_ptr,
    candidate_ptr,
    chances_ptr,
    owners_ptr,
    tokens_ptr,
    links_ptr,
    count_ptr,
    most,
    children,
    considered,
    width,
    candidates,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)[None, :]
    row = tl.load(row_ptr + request * most + m, mask=m < most, other=-1)
    present = row >= 0
    count = tl.load(count_ptr + request)
    at = count + (tl.cumsum(present.to(tl.int64)) - 1) * children
    # The parent among the candidates, from 1, and its chance; the root's is 1.
    below = present & (row > 0)
    parent = tl.load(candidate_ptr + request * width + row - 1, mask=below, other=-1) + 1
    path = tl.load(chances_ptr + request * candidates + parent - 1, mask=below, other=1.0)
    line = request * most + m[:, None]
    scored = present[:, None] & (k < considered)
    score = tl.load(scores_ptr + line * considered + k, mask=scored, other=float("-inf"))
    first = tl.load(scores_ptr + line * considered, mask=present[:, None], other=0.0)
    share = tl.exp(score - first)
    total = tl.where(present, tl.sum(tl.where(scored, share, 0.0), 1), 1.0)
    chance = path[:, None] * tl.div_rn(share, tl.broadcast_to(total[:, None], [BLOCK_M, BLOCK_K]))
    adopted = present[:, None] & (k < children)
    to = request * candidates + at[:, None] + k
    token = tl.load(found_ptr + line * considered + k, mask=adopted, other=-1)
    # Chances of parents are read above, those of children written below: other places, and after every thread has read.
    tl.debug_barrier()
    tl.store(tokens_ptr + to, token, mask=adopted)
    tl.store(links_ptr + to, tl.broadcast_to(parent[:, None], [BLOCK_M, BLOCK_K]), mask=adopted)
    tl.store(owners_ptr + to, tl.broadcast_to(row[:, None], [BLOCK_M, BLOCK_K]), mask=adopted)
    tl.store(chances_ptr + to, chance, mask=adopted)
    tl.store(count_ptr + request, count + tl.sum(present.to(tl.int64)) * children)


def adopt(
    row: Tensor,
    found: Tensor,
    scores: Tensor,
    children: int,
    candidate: Tensor,
    chances: Tensor,
    owners: Tensor,
    tokens: Tensor,
    links: Tensor,
    count: Tensor,
) -> None:
    """Enter the first `children` of each row's candidates, with the softmax of their scores as chances.

    Args:
        row: [B, M] int64, rows of the drafts' trees, 0 = root, as `expand` returns them; those of -1 are left out.
        found: [B * M, K] int64; scores: [B * M, K] float32, best first.
        children: at most K.
        candidate: [B, E] int64, which candidate each row of the draft's tree is.
        chances, owners, tokens: [B, C] float32, int64, int64, as in `expand`; written.
        links: [B, C] int64, each candidate's parent among the candidates, from 1; 0 = root; written. C is at least what
            `count` comes to.
        count: [B] int64, candidates; moved on.
    """
    (batch, most), considered = row.shape, scores.shape[1]
    assert row.is_contiguous() and row.dtype == torch.int64
    assert found.shape == scores.shape == (batch * most, considered) and 0 < children <= considered
    assert scores.is_contiguous() and scores.dtype == torch.float32 and found.is_contiguous()
    candidates = chances.shape[1]
    _states(batch, candidates, (owners, tokens, links), chances)
    _states(batch, candidate.shape[1], (candidate,))
    _numbers(batch, count)
    if batch and most:
        _adopt_kernel[(batch,)](
            row,
            found,
            scores,
            candidate,
            chances,
            owners,
            tokens,
            links,
            count,
            most,
            children,
            considered,
            candidate.shape[1],
            candidates,
            triton.next_power_of_2(most),
            triton.next_power_of_2(considered),
            num_warps=1 if most * considered <= 256 else 4,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["limit"])
def _likeliest_kernel(
    tokens_ptr,
    links_ptr,
    chances_ptr,
    count_ptr,
    out_tokens_ptr,
    out_parents_ptr,
    out_chance_ptr,
    chosen_ptr,
    candidates,
    nodes,
    limit,
    least,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A candidate's row is the number of those before it: C * C comparisons, BLOCK_J columns of them at a time.
    request = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + request).to(tl.int32)
    chances_ptr += request * candidates
    node = tl.arange(0, BLOCK_C)
    there = node < count
    chance = tl.load(chances_ptr + node, mask=there, other=-1.0)
    row = tl.zeros([BLOCK_C], tl.int32)
    for begin in range(0, count, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)[None, :]
        other = tl.load(chances_ptr + j, mask=j < count, other=-2.0)
        before = (other > chance[:, None]) | ((other == chance[:, None]) & (j < node[:, None]))
        row += tl.sum(before.to(tl.int32), 1)
    kept = there & (row < limit) & (chance >= least) & (chance > 0)
    link = tl.load(links_ptr + request * candidates + node, mask=there, other=0).to(tl.int32)
    parent = tl.where(link > 0, tl.gather(row, tl.maximum(link - 1, 0), 0) + 1, 0)
    token = tl.load(tokens_ptr + request * candidates + node, mask=kept, other=-1)
    out_tokens_ptr += request * nodes
    out_parents_ptr += request * nodes
    out_chance_ptr += request * nodes
    chosen_ptr += request * nodes
    store_tree(out_tokens_ptr, out_parents_ptr, out_chance_ptr, row, kept, token, parent, chance, nodes, BLOCK_N)
    tl.store(chosen_ptr + row, node.to(tl.int64), mask=kept)
    rest = tl.arange(0, BLOCK_N)
    absent = (rest >= tl.sum(kept.to(tl.int32))) & (rest < nodes)
    tl.store(chosen_ptr + rest, tl.zeros([BLOCK_N], tl.int64), mask=absent)


def likeliest_nodes(
    tokens: Tensor,
    links: Tensor,
    chances: Tensor,
    count: Tensor,
    nodes: int,
    limit: int,
    least: float,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best tree of at most `limit` candidates, the likeliest first.

    Args:
        tokens, links, chances, count: as `adopt` leaves them: [B, C], and [B].
        nodes: N, the shape of the result.
        least: the smallest chance worth a node.
        out: what is returned, to be written.

    Returns:
        tokens int64, parents int64, chances float32 and candidates' numbers int64, [B, N].
    """
    batch, candidates = chances.shape
    _states(batch, candidates, (tokens, links), chances)
    _numbers(batch, count)
    found = tree_memory(batch, nodes, torch.float32, chances.device, None if out is None else out[:3])
    numbers = torch.empty(batch, nodes, dtype=torch.int64, device=chances.device) if out is None else out[3]
    assert numbers.shape == (batch, nodes) and numbers.is_contiguous() and numbers.dtype == torch.int64
    if batch and nodes:
        block = triton.next_power_of_2(max(candidates, 1))
        warps = max(1, min(8, block // 32))
        _likeliest_kernel[(batch,)](
            tokens,
            links,
            chances,
            count,
            *found,
            numbers,
            candidates,
            nodes,
            min(limit, nodes),
            least,
            block,
            min(block, 8),
            triton.next_power_of_2(nodes),
            num_warps=warps,
        )
    return *found, numbers


def _states(batch: int, width: int, numbers: tuple[Tensor, ...], chances: Tensor | None = None) -> None:
    for each in numbers:
        assert each.shape == (batch, width) and each.is_contiguous() and each.dtype == torch.int64
    if chances is not None:
        assert chances.shape == (batch, width) and chances.is_contiguous() and chances.dtype == torch.float32


def _numbers(batch: int, *numbers: Tensor) -> None:
    for each in numbers:
        assert each.shape == (batch,) and each.is_contiguous() and each.dtype == torch.int64
