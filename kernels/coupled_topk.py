# SPDX-License-Identifier: Apache-2.0
"""Coupled children: a draft's candidates, ranked with the noise that the target's sampler will draw with.

The target's token at a position is the argmax of logits / temperature + Gumbel noise, and the noise is a function of the
request's seed, the position and the token alone. The K largest sums of a draft, with the same noise, are K draws from the draft
without replacement that agree with the target's draw as far as the two distributions do; were they equal, the first would
be the target's token.

The noise is that of vLLM's sampler (vllm/v1/worker/gpu/sample/gumbel.py, there without the salt for drafts): MurmurHash3 of the
words of seed, position and token, a uniform number from all 32 bits, -log(-log(1 - u)), each step in float32 and in the order of
that kernel, so that a compiler which fuses or approximates does it to both alike.

Memory traffic per row of V logits: V times their size, read once, in blocks of the vocabulary that run apart. Each block of 1024
writes K keys of 8 bytes, which a second, small kernel reads: 6% more than the logits alone in float32 at K = 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHILDREN = 16
BLOCK_VOCAB = 1024


def coupled_topk_reference(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    position: Tensor,
    count: int,
    rows: Tensor | None = None,
    *,
    scaled: bool = False,
    coupled: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `coupled_topk`, in torch: some thirty passes over [n, V]."""
    if rows is not None:
        temperature, seeds = temperature[rows.long()], seeds[rows.long()]
    heat = temperature.where(temperature > 0, 1.0).unsqueeze(1)
    sums = logits.float() if scaled else logits.float() / heat
    if coupled:
        token = torch.arange(logits.shape[1], device=logits.device)
        noise = _noise_reference(seeds.unsqueeze(1), position.unsqueeze(1), token)
        sums = sums + noise.where(temperature.unsqueeze(1) > 0, 0.0)
    sums = sums.where(sums == sums, float("-inf"))
    values, tokens = sums.sort(dim=1, descending=True, stable=True)
    return tokens[:, :count], values[:, :count] * heat


def _noise_reference(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    word = 0xFFFFFFFF

    def rotated(value: Tensor, shift: int) -> Tensor:
        return ((value << shift) | (value >> (32 - shift))) & word

    state = torch.zeros_like(seed)
    for key in (seed & word, (seed >> 32) & word, position & word, token):
        mixed = rotated((key * 0xCC9E2D51) & word, 15) * 0x1B873593 & word
        state = (rotated(state ^ mixed, 13) * 5 + 0xE6546B64) & word
    state = state ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & word
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & word
    state = state ^ (state >> 16)
    uniform = (state >> 16).float() * 2.0**-16 + ((state & 0xFFFF).float() + 0.5) * 2.0**-32
    series = torch.full_like(uniform, 1 / 8)
    for order in range(7, 0, -1):
        series = uniform * series + 1 / order
    rate = torch.where(uniform < 0.25, uniform * series, -torch.log((1.0 - uniform).clamp(min=2.0**-24)))
    return -torch.log(rate)


@triton.jit
def _mixed(state, word):
    """MurmurHash3's round: the state after one more word, both uint32."""
    word = word * 0xCC9E2D51
    word = ((word << 15) | (word >> 17)) * 0x1B873593
    state = state ^ word
    return ((state << 13) | (state >> 19)) * 5 + 0xE6546B64


@triton.jit
def gumbel_noise(seed, position, token):
    """Float32 noise of int32 tokens for a scalar int64 seed and position."""
    # What no token changes is hashed once.
    state = _mixed((seed * 0).to(tl.uint32), (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _mixed(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _mixed(state, (position & 0xFFFFFFFF).to(tl.uint32))
    state = _mixed(state, token.to(tl.uint32)) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    state = state ^ (state >> 16)
    # The halves convert exactly, so their sum is rounded once.
    high = (state >> 16).to(tl.int32).to(tl.float32)
    low = (state & 0xFFFF).to(tl.int32).to(tl.float32)
    uniform = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    # -log(1 - u): a series where 1 - u would lose what tells the largest noise from the next.
    series = 1.0 / 8.0
    for order in tl.static_range(7, 0, -1):
        series = 1.0 / order + uniform * series
    rate = tl.where(uniform < 0.25, uniform * series, -tl.log(tl.maximum(1.0 - uniform, 5.960464477539063e-08)))
    return -tl.log(rate)


@triton.jit
def _sortable(value, token):
    """int64 that orders as (value, then the lower token): no two tokens have the same."""
    value = tl.where(value == value, value, float("-inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def block_topk_kernel(
    logits_ptr,
    logits_row_stride,
    temperature_ptr,
    seeds_ptr,
    position_ptr,
    rows_ptr,
    partial_ptr,
    vocab_size,
    COUNT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    COUPLED: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    """The COUNT largest sums of one block of the vocabulary, as sortable integers, into partial [n, blocks, COUNT]."""
    line = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    request = line
    if HAS_ROWS:
        request = tl.load(rows_ptr + line).to(tl.int64)
    temperature = tl.load(temperature_ptr + request)
    token = block * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    exists = token < vocab_size
    value = tl.load(logits_ptr + line * logits_row_stride + token, mask=exists, other=float("-inf")).to(tl.float32)
    if temperature > 0.0:
        if not SCALED:
            value = value / temperature
        if COUPLED:
            value += gumbel_noise(tl.load(seeds_ptr + request), tl.load(position_ptr + line), token)

    least = -0x8000000000000000
    keys = tl.where(exists, _sortable(value, token), least)
    partial_ptr += (line * tl.num_programs(1) + block) * COUNT
    for place in tl.static_range(COUNT):
        best = tl.max(keys, axis=0)
        tl.store(partial_ptr + place, best)
        keys = tl.where(keys == best, least, keys)


@triton.jit
def merge_topk_kernel(
    partial_ptr,
    temperature_ptr,
    rows_ptr,
    tokens_ptr,
    scores_ptr,
    num_partial,
    COUNT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
):
    """The COUNT largest of partial [n, num_partial], as tokens and scores [n, COUNT]."""
    line = tl.program_id(0).to(tl.int64)
    request = line
    if HAS_ROWS:
        request = tl.load(rows_ptr + line).to(tl.int64)
    temperature = tl.load(temperature_ptr + request)
    scale = tl.where(temperature > 0.0, temperature, 1.0)
    least = -0x8000000000000000
    at = tl.arange(0, BLOCK_PARTIAL)
    keys = tl.load(partial_ptr + line * num_partial + at, mask=at < num_partial, other=least)
    for place in tl.static_range(COUNT):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, least, keys)
        bits = (best >> 32).to(tl.int32)
        value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        tl.store(tokens_ptr + line * COUNT + place, 0x7FFFFFFF - (best & 0x7FFFFFFF))
        tl.store(scores_ptr + line * COUNT + place, value * scale)


def coupled_topk(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    position: Tensor,
    count: int,
    rows: Tensor | None = None,
    *,
    scaled: bool = False,
    coupled: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` tokens of each row with the largest logit / temperature + noise, best first, the lower token of equals first.

    Args:
        logits: [n, V] float32, float16 or bfloat16, each row contiguous; what is NaN counts as -inf.
        temperature: [n] float32; 0 = greedy: no noise and no division.
        seeds: [n] int64, of the requests.
        position: [n] int64, of the row that will draw the token: with the seed it names the noise.
        count: K <= 16, K <= V.
        rows: [n] int32 or int64, each line's index into `temperature` and `seeds`, which are then [R]; None = line i has entry i.
        scaled: `logits` are divided by the temperature already.
        coupled: with noise; else the likeliest.
        out: tokens [n, K] int64 and scores [n, K] float32, contiguous, to be written.
        partial: [n, cdiv(V, 1024), K] int64, contiguous: scratch.

    Returns:
        tokens [n, K] int64; scores [n, K] float32, temperature * (logit / temperature + noise), and at temperature 0 the logit.
    """
    n, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, BLOCK_VOCAB)
    assert 0 < count <= min(MOST_CHILDREN, vocab_size), f"{count} of {vocab_size} tokens"
    assert logits.stride(1) == 1 or vocab_size == 1
    assert logits.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert temperature.dtype == torch.float32 and seeds.dtype == position.dtype == torch.int64
    assert temperature.is_contiguous() and seeds.is_contiguous() and position.is_contiguous() and position.shape == (n,)
    if rows is None:
        assert temperature.shape == seeds.shape == (n,)
    else:
        assert rows.shape == (n,) and rows.is_contiguous() and rows.dtype in (torch.int32, torch.int64)
    if out is None:
        tokens = torch.empty(n, count, dtype=torch.int64, device=logits.device)
        scores = torch.empty(n, count, dtype=torch.float32, device=logits.device)
    else:
        tokens, scores = out
        assert tokens.shape == scores.shape == (n, count) and tokens.is_contiguous() and scores.is_contiguous()
        assert tokens.dtype == torch.int64 and scores.dtype == torch.float32
    if partial is None:
        partial = torch.empty(n, blocks, count, dtype=torch.int64, device=logits.device)
    assert partial.shape == (n, blocks, count) and partial.is_contiguous() and partial.dtype == torch.int64
    if n:
        block_topk_kernel[(n, blocks)](
            logits,
            logits.stride(0),
            temperature,
            seeds,
            position,
            rows,
            partial,
            vocab_size,
            COUNT=count,
            HAS_ROWS=rows is not None,
            SCALED=scaled,
            COUPLED=coupled,
            BLOCK_VOCAB=BLOCK_VOCAB,
            num_warps=4,
        )
        merge_topk_kernel[(n,)](
            partial,
            temperature,
            rows,
            tokens,
            scores,
            blocks * count,
            COUNT=count,
            HAS_ROWS=rows is not None,
            BLOCK_PARTIAL=triton.next_power_of_2(blocks * count),
            num_warps=4,
        )
    return tokens, scores
