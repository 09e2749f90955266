# SPDX-License-Identifier: Apache-2.0
"""How often ranked candidates turn out right, counted on the device.

`judge` is `tree.ranks_loops.judge` (`Ranks.observe`), `rank_chances` is `tree.ranks_loops.rank_chances` (`Ranks.chance`),
with the same arguments; both plain versions stand in tree/ranks.py, some 30 launches and 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Requests that are added side by side, whatever the batch: what is compiled does not depend on it.
TOGETHER = 32


@triton.jit
def _judge_kernel(
    offered_ptr,
    offered_at_ptr,
    hits_ptr,
    seen_ptr,
    slots_ptr,
    token_ids_ptr,
    lengths_ptr,
    emitted_ptr,
    new_ptr,
    row_stride,
    depth,
    per_depth,
    keep,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + request)
    emitted = tl.load(emitted_ptr + request)
    begin = tl.load(lengths_ptr + request) - emitted
    in_time = tl.load(offered_at_ptr + slot) == begin
    deep, rank = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)[None, :]
    reached = deep < tl.where(in_time, tl.minimum(emitted, depth), 0)
    cell = deep[:, None] * per_depth + rank
    inside = (deep[:, None] < depth) & (rank < per_depth)
    offered = tl.load(offered_ptr + slot * depth * per_depth + cell, mask=inside, other=-1)
    first = tl.load(offered_ptr + (slot * depth + deep) * per_depth, mask=reached, other=-1)
    judged = reached & (first >= 0)
    token = tl.load(token_ids_ptr + slot * row_stride + begin + deep, mask=judged, other=-1)
    hit = (judged[:, None] & (offered == token[:, None])).to(tl.float32)
    seen = judged.to(tl.float32)
    decay = tl.where(judged, keep, 1.0)
    hits_ptr += slot * depth * per_depth
    seen_ptr += slot * depth
    counted = tl.load(hits_ptr + cell, mask=inside, other=0.0) * decay[:, None] + hit
    told = tl.load(seen_ptr + deep, mask=deep < depth, other=0.0) * decay + seen
    # Every thread has read what was offered before it is forgotten.
    tl.debug_barrier()
    tl.store(hits_ptr + cell, counted, mask=inside)
    tl.store(seen_ptr + deep, told, mask=deep < depth)
    tl.store(offered_ptr + slot * depth * per_depth + cell, tl.full([BLOCK_D, BLOCK_K], -1, tl.int64), mask=inside)
    new_ptr += request * depth * (per_depth + 1)
    tl.store(new_ptr + deep[:, None] * (per_depth + 1) + rank, hit, mask=inside)
    tl.store(new_ptr + deep * (per_depth + 1) + per_depth, seen, mask=deep < depth)


@triton.jit(do_not_specialize=["batch"])
def _together_kernel(
    hits_ptr, seen_ptr, new_ptr, batch, depth, per_depth, keep, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):
    # All requests' counts of one depth. Numbers of hits are whole, so their sums are exact in any order.
    deep = tl.program_id(0)
    request, rank = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    hits = tl.zeros([BLOCK_K], tl.float32)
    seen = tl.zeros([BLOCK_B], tl.float32)
    for begin in range(0, batch, BLOCK_B):
        line = ((begin + request).to(tl.int64) * depth + deep) * (per_depth + 1)
        inside = begin + request < batch
        seen += tl.load(new_ptr + line + per_depth, mask=inside, other=0.0)
        cells = inside[:, None] & (rank < per_depth)[None, :]
        hits += tl.sum(tl.load(new_ptr + line[:, None] + rank[None, :], mask=cells, other=0.0), 0)
    total = tl.sum(seen)
    decay = tl.where(total > 0, keep, 1.0)
    at = hits_ptr + deep * per_depth + rank
    tl.store(at, tl.load(at, mask=rank < per_depth, other=0.0) * decay + hits, mask=rank < per_depth)
    tl.store(seen_ptr + deep, tl.load(seen_ptr + deep) * decay + total)


def judge(
    offered: Tensor,
    offered_at: Tensor,
    hits: Tensor,
    seen: Tensor,
    slots: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    num_emitted: Tensor,
    keep: float,
) -> None:
    """Judge what was offered by what was emitted, and forget it, in place.

    Args:
        offered: [R, D, K] int64; offered_at: [R] int64; hits: [R + 1, D, K] and seen: [R + 1, D, 1] float32.
        slots, lengths, num_emitted: [B] int64, slots distinct; token_ids: [R, max_len] int32.
        keep: the share of a count that stays when its depth is judged; it counts as a float32.

    Traffic: 28 * B * D * K bytes, and the counts of B + 1 requests read and written.
    """
    (rows, depth, per_depth), batch = offered.shape, len(slots)
    assert hits.shape == (rows + 1, depth, per_depth) and seen.shape == (rows + 1, depth, 1)
    assert offered.dtype == offered_at.dtype == torch.int64 and hits.dtype == seen.dtype == torch.float32
    for each in (offered, offered_at, hits, seen):
        assert each.is_contiguous()
    for each in (slots, lengths, num_emitted):
        assert each.shape == (batch,) and each.is_contiguous() and each.dtype == torch.int64
    assert token_ids.stride(1) == 1
    if not (batch and depth and per_depth):
        return
    new = torch.empty(batch, depth, per_depth + 1, dtype=torch.float32, device=offered.device)
    width = triton.next_power_of_2(per_depth)
    state = offered, offered_at, hits, seen, slots, token_ids, lengths, num_emitted, new
    shape = token_ids.stride(0), depth, per_depth, keep, triton.next_power_of_2(depth), width
    _judge_kernel[(batch,)](*state, *shape, num_warps=1, enable_fp_fusion=False)
    shape = batch, depth, per_depth, keep, TOGETHER, width
    _together_kernel[(depth,)](hits[-1], seen[-1], new, *shape, num_warps=1, enable_fp_fusion=False)


@triton.jit
def _chances_kernel(
    hits_ptr,
    seen_ptr,
    all_hits_ptr,
    all_seen_ptr,
    slots_ptr,
    first_ptr,
    chance_ptr,
    depth,
    per_depth,
    prior,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + request)
    deep, rank = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_K)[None, :]
    inside = (deep < depth) & (rank < per_depth)
    cell = deep * per_depth + rank
    all_hits = tl.load(all_hits_ptr + cell, mask=inside, other=0.0)
    all_seen = tl.load(all_seen_ptr + deep + rank * 0, mask=inside, other=0.0)
    first = tl.load(first_ptr + deep * 0 + rank, mask=inside, other=0.0)
    usual = tl.div_rn(all_hits + prior * first, all_seen + prior)
    hits = tl.load(hits_ptr + slot * depth * per_depth + cell, mask=inside, other=0.0)
    seen = tl.load(seen_ptr + slot * depth + deep + rank * 0, mask=inside, other=0.0)
    chance = tl.div_rn(hits + prior * usual, seen + prior)
    tl.store(chance_ptr + request * depth * per_depth + cell, chance, mask=inside)


def rank_chances(
    hits: Tensor, seen: Tensor, slots: Tensor, first: Tensor, prior: float, out: Tensor | None = None
) -> Tensor:
    """[B, D, K] float32: the chance of each candidate.

    Args:
        hits, seen, slots: as for `judge`.
        first: [K] float32, before anything is seen; prior: belief in it, as a float32.
        out: what is returned, to be written.
    """
    (rows, depth, per_depth), batch = hits.shape, len(slots)
    assert seen.shape == (rows, depth, 1) and first.shape == (per_depth,)
    assert hits.dtype == seen.dtype == first.dtype == torch.float32 and slots.dtype == torch.int64
    for each in (hits, seen, slots, first):
        assert each.is_contiguous()
    shape = (batch, depth, per_depth)
    chance = torch.empty(shape, dtype=torch.float32, device=hits.device) if out is None else out
    assert chance.shape == shape and chance.dtype == torch.float32 and chance.is_contiguous()
    if batch and depth and per_depth:
        blocks = triton.next_power_of_2(depth), triton.next_power_of_2(per_depth)
        given = hits, seen, hits[-1], seen[-1], slots, first, chance, depth, per_depth, prior
        _chances_kernel[(batch,)](*given, *blocks, num_warps=1, enable_fp_fusion=False)
    return chance
