# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup on the device: `history_guesses` is `proposers.history.history_guesses`, which is its plain version.

Two launches in place of some 35: every part of a text finds its best places, then a program per request picks among
them, compares those that it takes for longer, and copies what follows. The text is read once, 4 bytes per token (the
neighbours of a token come from the cache), where the plain version writes and reads it a dozen times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The longest text that there may be is searched in at most so many parts, of this many tokens at least: few places are left
# to pick among, and a single long text still occupies the device.
PARTS, SHORTEST = 64, 512


# The length of the longest text grows with every step: it must not make another program each time.
@triton.jit(do_not_specialize=["span"])
def _search_kernel(
    token_ids_ptr,
    slots_ptr,
    lengths_ptr,
    places_ptr,
    row_stride,
    span,
    guesses,
    SEARCHED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # A place is a number: tokens matched before it, times span, plus where it is. The best of a part, one after the other.
    request, part = tl.program_id(0), tl.program_id(1)
    text_ptr = token_ids_ptr + tl.load(slots_ptr + request) * row_stride
    end = tl.load(lengths_ptr + request).to(tl.int32)
    place = part * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    run = place < end
    found = tl.zeros([BLOCK_SIZE], tl.int32)
    for step in tl.static_range(1, SEARCHED + 1):
        run = run & (place >= step)
        ending = tl.load(text_ptr + end - step, mask=end >= step, other=-1)
        run = run & (tl.load(text_ptr + place - step, mask=run, other=-2) == ending)
        found += run.to(tl.int32)
    left = tl.where(found > 0, found * span + place, -1)
    to = (request * tl.num_programs(1) + part) * guesses
    for rank in range(guesses):
        most = tl.max(left)
        tl.store(places_ptr + to + rank, most)
        left = tl.where(left == most, -1, left)


@triton.jit(do_not_specialize=["span", "found"])
def _guess_kernel(
    token_ids_ptr,
    slots_ptr,
    lengths_ptr,
    places_ptr,
    odds_of_ptr,
    ngrams_ptr,
    odds_ptr,
    row_stride,
    span,
    guesses,
    length,
    longest,
    found,
    FOUND: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
    LONGEST: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    text_ptr = token_ids_ptr + tl.load(slots_ptr + request) * row_stride
    end = tl.load(lengths_ptr + request).to(tl.int32)
    each = tl.arange(0, FOUND)
    left = tl.load(places_ptr + request * found + each, mask=each < found, other=-1)
    back = tl.arange(0, LONGEST)
    ending = tl.load(text_ptr + end - 1 - back, mask=(back < longest) & (back < end), other=-1)
    rank_of = tl.arange(0, BLOCK_G)
    taken = tl.full([BLOCK_G], -1, tl.int32)
    for rank in range(guesses):
        most = tl.max(left)
        left = tl.where(left == most, -1, left)
        if most >= 0:
            place = most % span
            reached = (back < longest) & (back < place)
            before = tl.load(text_ptr + place - 1 - back, mask=reached, other=-2)
            matched = tl.min(tl.where(reached & (before == ending), longest, back))
            taken = tl.where(rank_of == rank, tl.minimum(matched, longest) * span + place, taken)
    ahead = tl.arange(0, BLOCK_L)
    for rank in range(guesses):
        most = tl.max(taken)
        taken = tl.where(taken == most, -1, taken)
        place, matched = most % span, most // span
        period = tl.maximum(end - place, 1)
        copied = ahead < tl.where(most >= 0, length, 0)
        token = tl.load(text_ptr + place + ahead % period, mask=copied, other=-1)
        entry = rank * (longest + 1) + tl.minimum(matched + ahead, longest)
        odds = tl.load(odds_of_ptr + entry, mask=copied, other=0.0)
        to = (request * guesses + rank) * length + ahead
        tl.store(ngrams_ptr + to, token.to(tl.int64), mask=ahead < length)
        tl.store(odds_ptr + to, odds, mask=ahead < length)


def history_guesses(
    token_ids: Tensor,
    slots: Tensor,
    lengths: Tensor,
    max_length: int,
    guesses: int,
    length: int,
    searched: int,
    odds_of: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What followed the most similar earlier places of each request's text, the most similar first.

    Args:
        token_ids: [R, max_len] int32; slots, lengths: [B] int64: token_ids[slot, :length] is the text.
        max_length: host-side upper bound of lengths.
        guesses: G; length: L.
        searched: tokens of the ending that the whole text is searched for.
        odds_of: [G, LONGEST + 1] float, the odds by rank and by tokens matched.
        out: what is returned, to be written.

    Returns:
        guesses [B, G, L] int64, all -1 where there is none; odds [B, G, L] of `odds_of`'s type, 0 there.
    """
    batch, span, longest = len(slots), min(max_length, token_ids.shape[1]), odds_of.shape[1] - 1
    assert token_ids.dtype == torch.int32 and token_ids.stride(1) == 1
    assert slots.dtype == lengths.dtype == torch.int64 and slots.is_contiguous() and lengths.is_contiguous()
    assert odds_of.shape[0] == guesses and odds_of.is_contiguous() and span * (max(searched, longest) + 1) < 1 << 31
    shape, device = (batch, guesses, length), token_ids.device
    if out is None:
        out = (
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=odds_of.dtype, device=device),
        )
    ngrams, odds = out
    assert ngrams.shape == odds.shape == shape and ngrams.dtype == torch.int64 and odds.dtype == odds_of.dtype
    assert ngrams.is_contiguous() and odds.is_contiguous()
    if not (batch and span and guesses and length):
        return ngrams, odds
    # What is compiled depends on the table's width, not on how long the texts have become.
    widest = token_ids.shape[1]
    block = triton.next_power_of_2(max(SHORTEST, triton.cdiv(widest, PARTS)))
    parts, most = triton.cdiv(span, block), triton.cdiv(widest, block) * guesses
    places = torch.empty(batch, parts * guesses, dtype=torch.int32, device=device)
    text = token_ids, slots, lengths, places
    stride = token_ids.stride(0)
    _search_kernel[(batch, parts)](*text, stride, span, guesses, searched, block, num_warps=4)
    _guess_kernel[(batch,)](
        *text,
        odds_of,
        ngrams,
        odds,
        stride,
        span,
        guesses,
        length,
        longest,
        parts * guesses,
        triton.next_power_of_2(most),
        triton.next_power_of_2(guesses),
        triton.next_power_of_2(length),
        triton.next_power_of_2(longest),
        num_warps=1 if most <= 512 else 4,
    )
    return ngrams, odds
