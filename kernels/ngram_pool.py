# SPDX-License-Identifier: Apache-2.0
"""N-gram pools on the device: `lookup` is `NgramPool.lookup`, `insert` is `NgramPool.insert` (proposers/pool.py).

Both with the pool's `entries` in place of the pool: [rows, buckets + 1, ways, ngram] int32, the last bucket never used.
The plain versions are the two methods there: 5 launches for a lookup, some 35 for an insertion, whose intermediates are
of size [P, M, M + ways, ngram].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPREAD = tl.constexpr(0x9E3779B1)  # proposers.pool._SPREAD

# N-grams before its own that a program looks at side by side.
AT_ONCE = 32


@triton.jit
def _bucket(key, buckets):
    return (key.to(tl.int64) * SPREAD >> 12) & (buckets - 1)


@triton.jit
def _lookup_kernel(
    entries_ptr, rows_ptr, key_ptr, found_ptr, buckets, ways, ngram, WAYS: tl.constexpr, NGRAM: tl.constexpr
):
    request = tl.program_id(0)
    key = tl.load(key_ptr + request)
    bucket = tl.load(rows_ptr + request) * (buckets + 1) + _bucket(key, buckets)
    way, place = tl.arange(0, WAYS)[:, None], tl.arange(0, NGRAM)[None, :]
    entries = bucket * ways * ngram + way * ngram
    first = tl.load(entries_ptr + entries, mask=way < ways, other=-1)
    behind = (way < ways) & (place < ngram - 1)
    tokens = tl.load(entries_ptr + entries + place + 1, mask=behind, other=-1).to(tl.int64)
    to = (request.to(tl.int64) * ways + way) * (ngram - 1) + place
    tl.store(found_ptr + to, tl.where(first == key, tokens, -1), mask=behind)


def lookup(entries: Tensor, rows: Tensor, key: Tensor, out: Tensor | None = None) -> Tensor:
    """[B, ways, ngram - 1] int64: what followed `key` [B] in the pools `rows` [B] int64, last used first, -1 = none.

    Traffic: one bucket per request, 4 * ways * ngram bytes read and twice that written; the time is that of a launch.
    """
    _, buckets, ways, ngram = _checked(entries, rows)
    batch = len(rows)
    found = out if out is not None else torch.empty(batch, ways, ngram - 1, dtype=torch.int64, device=entries.device)
    assert found.shape == (batch, ways, ngram - 1) and found.is_contiguous() and found.dtype == torch.int64
    assert key.shape == rows.shape and key.is_contiguous()
    width = triton.next_power_of_2(ngram)
    if batch and ngram > 1:
        _lookup_kernel[(batch,)](
            entries, rows, key, found, buckets, ways, ngram, triton.next_power_of_2(ways), width, num_warps=1
        )
    return found


@triton.jit
def _put(kept, count, ngram, WAYS: tl.constexpr):
    """`ngram` [1, NGRAM] behind the `count` n-grams of `kept` [WAYS, NGRAM], unless it is one of them."""
    way = tl.arange(0, WAYS)[:, None]
    differs = tl.max((kept != ngram).to(tl.int32), 1)
    known = tl.sum(((differs == 0) & (tl.arange(0, WAYS) < count)).to(tl.int32)) > 0
    kept = tl.where((way == count) & (not known), ngram, kept)
    return kept, tl.where(known, count, count + 1)


# How many n-grams there are goes with the batch where all requests share a pool: it must not make another program each time.
@triton.jit(do_not_specialize=["many"])
def _insert_kernel(
    entries_ptr,
    rows_ptr,
    ngrams_ptr,
    valid_ptr,
    buckets,
    ways,
    ngram,
    many,
    AT_ONCE: tl.constexpr,
    WAYS: tl.constexpr,
    NGRAM: tl.constexpr,
):
    # A program per n-gram; the first valid one of a bucket writes the whole bucket, and nobody else touches it. It reads
    # its row's n-grams from its own on, the most recent first, then what the bucket holds: the first `ways` different
    # ones are the new content, gathered in registers. At most `many` short rounds, most of which end at the bucket.
    row, own = tl.program_id(0), tl.program_id(1)
    ngrams_ptr += row.to(tl.int64) * many * ngram
    valid_ptr += row.to(tl.int64) * many
    if tl.load(valid_ptr + own) != 0:
        bucket = _bucket(tl.load(ngrams_ptr + own * ngram), buckets)
        taken = tl.zeros([AT_ONCE], tl.int32)
        for begin in range(0, own, AT_ONCE):
            each = begin + tl.arange(0, AT_ONCE)
            earlier = (each < own) & (tl.load(valid_ptr + each, mask=each < own, other=0) != 0)
            keys = tl.load(ngrams_ptr + each * ngram, mask=earlier, other=0)
            taken += (earlier & (_bucket(keys, buckets) == bucket)).to(tl.int32)
        if tl.sum(taken) == 0:
            way, place = tl.arange(0, WAYS)[:, None], tl.arange(0, NGRAM)[None, :]
            entries_ptr += (tl.load(rows_ptr + row) * (buckets + 1) + bucket) * ways * ngram
            kept = tl.full((WAYS, NGRAM), -1, tl.int64)
            count = tl.full((), 0, tl.int32)
            for other in range(own, many):
                if tl.load(valid_ptr + other) != 0 and count < ways:
                    if _bucket(tl.load(ngrams_ptr + other * ngram), buckets) == bucket:
                        new = tl.load(ngrams_ptr + other * ngram + place, mask=place < ngram, other=-1)
                        kept, count = _put(kept, count, new, WAYS)
            for old in range(ways):
                if tl.load(entries_ptr + old * ngram) >= 0 and count < ways:
                    known = tl.load(entries_ptr + old * ngram + place, mask=place < ngram, other=-1).to(tl.int64)
                    kept, count = _put(kept, count, known, WAYS)
            # Every thread has read the bucket before any writes to it.
            tl.debug_barrier()
            inside = (way < ways) & (place < ngram)
            tl.store(entries_ptr + way * ngram + place, kept.to(tl.int32), mask=inside)


def insert(entries: Tensor, rows: Tensor, ngrams: Tensor, valid: Tensor) -> None:
    """Store n-grams as the most recently used of their buckets, as if one after the other, the last of a row first.

    Args:
        entries: [rows, buckets + 1, ways, ngram] int32, written.
        rows: [P] int64, distinct.
        ngrams: [P, M, ngram] int64.
        valid: [P, M] bool, which of them to store.

    Traffic: P * M * (8 * ngram + 1) bytes of n-grams, and every bucket that gets one read and written once.
    """
    _, buckets, ways, ngram = _checked(entries, rows)
    pools, many, width = ngrams.shape
    assert width == ngram and pools == len(rows) and valid.shape == (pools, many)
    assert ngrams.is_contiguous() and ngrams.dtype == torch.int64
    assert valid.is_contiguous() and valid.dtype == torch.bool
    if pools and many:
        _insert_kernel[(pools, many)](
            entries,
            rows,
            ngrams,
            valid.view(torch.uint8),
            buckets,
            ways,
            ngram,
            many,
            AT_ONCE,
            triton.next_power_of_2(ways),
            triton.next_power_of_2(ngram),
            num_warps=1,
        )


def _checked(entries: Tensor, rows: Tensor) -> tuple[int, int, int, int]:
    """Rows, buckets, ways and length of the n-grams."""
    assert entries.dim() == 4 and entries.is_contiguous() and entries.dtype == torch.int32
    assert rows.dim() == 1 and rows.is_contiguous() and rows.dtype == torch.int64
    count, buckets, ways, ngram = entries.shape
    return count, buckets - 1, ways, ngram
