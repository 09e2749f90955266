# SPDX-License-Identifier: Apache-2.0
"""What the promises of several sources are worth, counted on the device.

`observe` and `factors` are those of `tree.union_loops` and of `Calibration` (tree/calibration.py), with the loops'
arguments. The plain versions are these: some 45 launches and 25 in tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_spec_plugins.kernels.selection import bits_of

# Requests that are added side by side, whatever the batch: what is compiled does not depend on it.
TOGETHER = 32


@triton.jit
def _observe_kernel(
    slots_ptr,
    token_ids_ptr,
    lengths_ptr,
    emitted_ptr,
    tokens_ptr,
    parents_ptr,
    odds_ptr,
    source_ptr,
    offered_at_ptr,
    counts_ptr,
    new_ptr,
    row_stride,
    columns,
    nodes,
    sources,
    max_depth,
    memory_bits,
    BLOCK_R: tl.constexpr,
):
    # As many rounds as levels came true, mostly a few, then one per source and level: three sums of a vector each.
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + request)
    emitted = tl.load(emitted_ptr + request)
    known = tl.load(lengths_ptr + request) - emitted
    count = tl.minimum(tl.minimum(emitted, max_depth), columns - known)
    count = tl.where(tl.load(offered_at_ptr + slot) == known, tl.maximum(count, 0), 0).to(tl.int32)
    row = tl.arange(0, BLOCK_R)
    node = (row > 0) & (row <= nodes)
    at = slot * nodes + row - 1
    token = tl.load(tokens_ptr + at, mask=node, other=-1)
    up = tl.load(parents_ptr + at, mask=node, other=0).to(tl.int32)
    odds = tl.load(odds_ptr + at, mask=node, other=0.0)
    source = tl.load(source_ptr + row - 1, mask=node, other=-1)
    # Levels up to the first that no emitted token can judge; nodes below it count as that level.
    depth = tl.zeros([BLOCK_R], tl.int32)
    for _ in range(count + 1):
        depth = tl.where(row == 0, 0, tl.gather(depth, up, 0) + 1)
    reached = node & (token >= 0) & (depth <= count)
    text = tl.load(token_ids_ptr + slot * row_stride + known + depth - 1, mask=reached, other=-1)
    match = reached & (token == text)
    right = (row == 0).to(tl.int32)
    for _ in range(count):
        right = tl.where(row == 0, 1, tl.where(match, tl.gather(right, up, 0), 0))
    judged = reached & (tl.gather(right, up, 0) > 0)

    memory = memory_bits.to(tl.int64).to(tl.float64, bitcast=True)
    # Every thread knows whether what was offered is in time before it is forgotten.
    tl.debug_barrier()
    tl.store(offered_at_ptr + slot, tl.full([], -1, tl.int64))
    for each in range(sources):
        places = tl.zeros([], tl.float64)
        promised = tl.zeros([], tl.float64)
        hits = tl.zeros([], tl.float64)
        for level in range(count):
            here = judged & (source == each) & (depth == level + 1)
            total = tl.sum(tl.where(here, odds, 0.0))
            places += tl.max(here.to(tl.float64))
            promised += total / (1.0 + total)
            hits += tl.max((here & match).to(tl.float64))
        kept = tl.where(places > 0.0, memory, 1.0)
        own = counts_ptr + (slot * sources + each) * 3
        tl.store(own, tl.load(own) * kept + places)
        tl.store(own + 1, tl.load(own + 1) * kept + promised)
        tl.store(own + 2, tl.load(own + 2) * kept + hits)
        new = new_ptr + (request * sources + each) * 3
        tl.store(new, places)
        tl.store(new + 1, promised)
        tl.store(new + 2, hits)


@triton.jit(do_not_specialize=["batch"])
def _together_kernel(all_ptr, new_ptr, batch, sources, memory_bits, BLOCK_B: tl.constexpr):
    # All requests' figures of one source. A row of the batch is always added at the same place: ranks agree.
    each = tl.program_id(0)
    request = tl.arange(0, BLOCK_B)[:, None]
    figure = tl.arange(0, 4)[None, :]
    sums = tl.zeros([BLOCK_B, 4], tl.float64)
    for begin in range(0, batch, BLOCK_B):
        line = ((begin + request).to(tl.int64) * sources + each) * 3 + figure
        sums += tl.load(new_ptr + line, mask=(begin + request < batch) & (figure < 3), other=0.0)
    total = tl.sum(sums, 0)
    column = tl.arange(0, 4)
    places = tl.sum(tl.where(column == 0, total, 0.0))
    memory = memory_bits.to(tl.int64).to(tl.float64, bitcast=True)
    at = all_ptr + each * 3 + column
    counted = tl.load(at, mask=column < 3, other=0.0) * tl.where(places > 0.0, memory, 1.0)
    tl.store(at, counted + total, mask=column < 3)


def observe(
    slots: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    emitted: Tensor,
    tokens: Tensor,
    parents: Tensor,
    odds: Tensor,
    source: Tensor,
    offered_at: Tensor,
    counts: Tensor,
    max_depth: int,
    memory: float,
) -> None:
    """Judge what was offered by what was emitted, and forget it, in place.

    Args:
        slots, lengths, emitted: [B] int64, slots distinct; token_ids: [R, max_len] int32.
        tokens, parents: [R, M] int64, odds: [R, M] float64: forests; source: [M] int64.
        offered_at: [R] int64; counts: [R + 1, S, 3] float64.
        max_depth: of any forest.
        memory: the share of a count that stays when its source is judged.

    Traffic: 24 * B * M bytes read, and the counts of B + 1 requests read and written.
    """
    (rows, nodes), batch, sources = tokens.shape, len(slots), counts.shape[1]
    assert counts.shape == (rows + 1, sources, 3) and source.shape == (nodes,) and token_ids.stride(1) == 1
    assert parents.shape == odds.shape == (rows, nodes) and offered_at.shape == (rows,)
    assert odds.dtype == counts.dtype == torch.float64
    for each in (slots, lengths, emitted):
        assert each.shape == (batch,) and each.is_contiguous() and each.dtype == torch.int64
    for each in (tokens, parents, source, offered_at):
        assert each.is_contiguous() and each.dtype == torch.int64
    assert odds.is_contiguous() and counts.is_contiguous()
    if not (batch and sources):
        return
    new = torch.empty(batch, sources, 3, dtype=torch.float64, device=tokens.device)
    block = triton.next_power_of_2(nodes + 1)
    _observe_kernel[(batch,)](
        slots,
        token_ids,
        lengths,
        emitted,
        tokens,
        parents,
        odds,
        source,
        offered_at,
        counts,
        new,
        token_ids.stride(0),
        token_ids.shape[1],
        nodes,
        sources,
        max_depth,
        bits_of(memory),
        block,
        num_warps=max(1, min(4, block // 64)),
        enable_fp_fusion=False,
    )
    _together_kernel[(sources,)](
        counts[-1], new, batch, sources, bits_of(memory), TOGETHER, num_warps=1, enable_fp_fusion=False
    )


@triton.jit
def _factor(promise, share, extreme):
    promise = tl.minimum(tl.maximum(promise, extreme), 1.0 - extreme)
    share = tl.minimum(tl.maximum(share, extreme), 1.0 - extreme)
    return share * (1.0 - promise) / (promise * (1.0 - share))


@triton.jit
def _factors_kernel(
    slots_ptr, counts_ptr, all_ptr, found_ptr, sources, prior_bits, extreme_bits, BLOCK_S: tl.constexpr
):
    request = tl.program_id(0).to(tl.int64)
    source = tl.arange(0, BLOCK_S)
    inside = source < sources
    prior = prior_bits.to(tl.int64).to(tl.float64, bitcast=True)
    extreme = extreme_bits.to(tl.int64).to(tl.float64, bitcast=True)
    places = tl.load(all_ptr + source * 3, mask=inside, other=0.0)
    promised = tl.load(all_ptr + source * 3 + 1, mask=inside, other=0.0)
    right = tl.load(all_ptr + source * 3 + 2, mask=inside, other=0.0)
    general = tl.where(places > 0.0, promised / tl.where(places > 0.0, places, 1.0), 0.5)
    overall = _factor(general, (right + prior * general) / (places + prior), extreme)
    own = counts_ptr + (tl.load(slots_ptr + request) * sources + source) * 3
    places = tl.load(own, mask=inside, other=0.0)
    promised = tl.load(own + 1, mask=inside, other=0.0)
    right = tl.load(own + 2, mask=inside, other=0.0)
    promise = tl.where(places > 0.0, promised / tl.where(places > 0.0, places, 1.0), general)
    expected = promise * overall / (1.0 - promise + promise * overall)
    found = _factor(promise, (right + prior * expected) / (places + prior), extreme)
    tl.store(found_ptr + request * sources + source, found, mask=inside)


def factors(slots: Tensor, counts: Tensor, prior: float, extreme: float, out: Tensor | None = None) -> Tensor:
    """[B, S] float64: what to multiply each source's odds with.

    Args:
        slots: [B] int64; counts: [R + 1, S, 3] float64, as `observe` leaves them.
        prior: places' worth of belief in all requests' figures; extreme: no share counts as nearer to 0 or 1.
        out: what is returned, to be written.
    """
    batch, sources = len(slots), counts.shape[1]
    assert slots.is_contiguous() and slots.dtype == torch.int64
    assert counts.is_contiguous() and counts.dtype == torch.float64 and counts.shape[2] == 3
    found = torch.empty(batch, sources, dtype=torch.float64, device=counts.device) if out is None else out
    assert found.shape == (batch, sources) and found.dtype == torch.float64 and found.is_contiguous()
    if batch and sources:
        given = slots, counts, counts[-1], found, sources, bits_of(prior), bits_of(extreme)
        _factors_kernel[(batch,)](*given, triton.next_power_of_2(sources), num_warps=1, enable_fp_fusion=False)
    return found
