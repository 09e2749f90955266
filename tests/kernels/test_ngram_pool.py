# SPDX-License-Identifier: Apache-2.0
"""Pools of n-grams: the kernels leave in memory, bit for bit, what the methods of the pool leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Cases
from tests.kernels.guarded import Guarded
from vllm_spec_plugins.kernels import ngram_pool
from vllm_spec_plugins.proposers.pool import NgramPool


def some_ngrams(rng: torch.Generator, pools: int, many: int, ngram: int, tokens: int) -> tuple[Tensor, Tensor]:
    ngrams = torch.randint(min(tokens, 3), (pools, many, ngram), generator=rng)
    ngrams[:, :, 0] = torch.randint(tokens, (pools, many), generator=rng)
    return ngrams, torch.rand(pools, many, generator=rng) < 0.7


def test_pools_hold_and_find_what_the_plain_ones_do(cases: Cases, rng: torch.Generator) -> None:
    for draw in cases(ngram_pool._insert_kernel, ngram_pool._lookup_kernel):
        # Few tokens make full buckets and repetitions.
        buckets, ways, ngram = 1 << draw.number(0, 6), draw.number(1, 7), draw.number(2, 6)
        many, tokens, pools = draw.number(1, 12), draw.one_of(3, 9, 12, 250_000), draw.number(3, 5)
        pool = NgramPool(pools, buckets, ways, ngram, torch.device("cpu"))
        for _ in range(draw.number(0, 3)):  # what was there before
            pool.insert(torch.arange(pools), *some_ngrams(rng, pools, many, ngram, tokens))
        memory, inserted = Guarded(rng), draw.number(1, 3)
        entries = memory.holding(pool.entries)
        rows = torch.randperm(pools, generator=rng)[:inserted]
        ngrams, valid = some_ngrams(rng, inserted, many, ngram, tokens)
        pool.insert(rows, ngrams, valid)
        ngram_pool.insert(entries, rows, ngrams, valid)
        assert torch.equal(entries, pool.entries)

        asked = draw.number(1, 7)
        rows = torch.randint(pools, (asked,), generator=rng)
        known = ngrams[:, 0, 0][torch.randint(inserted, (asked,), generator=rng)]
        key = torch.randint(tokens, (asked,), generator=rng).where(torch.rand(asked, generator=rng) < 0.4, known)
        found = ngram_pool.lookup(entries, rows, key, memory((asked, ways, ngram - 1), torch.int64))
        assert torch.equal(found, pool.lookup(rows, key))
        memory.assert_untouched()


def test_one_pool_takes_the_ngrams_of_a_whole_batch(rng: torch.Generator) -> None:
    pool = NgramPool(1, 16, 3, 4, torch.device("cpu"))
    entries = pool.entries.clone()
    ngrams, valid = some_ngrams(rng, 1, 100, 4, 40)
    row = torch.zeros(1, dtype=torch.int64)
    pool.insert(row, ngrams, valid)
    ngram_pool.insert(entries, row, ngrams, valid)
    assert torch.equal(entries, pool.entries)


def test_another_order_of_the_ngrams_is_seen(rng: torch.Generator) -> None:
    """The control: what was inserted last does matter."""
    pool = NgramPool(1, 1, 3, 2, torch.device("cpu"))
    entries = pool.entries.clone()
    ngrams = torch.randperm(50, generator=rng)[:10].view(1, 5, 2)
    row, valid = torch.zeros(1, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)
    pool.insert(row, ngrams, valid)
    ngram_pool.insert(entries, row, ngrams.flip(1).contiguous(), valid)
    assert not torch.equal(entries, pool.entries)


def test_a_pool_laid_out_otherwise_is_refused() -> None:
    entries = torch.zeros(2, 5, 4, 3, dtype=torch.int32).transpose(2, 3)
    with pytest.raises(AssertionError):
        ngram_pool.lookup(entries, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
