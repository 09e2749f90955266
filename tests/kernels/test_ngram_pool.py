# SPDX-License-Identifier: Apache-2.0
"""Pools of n-grams: the kernels leave in memory, bit for bit, what the methods of the pool leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.guarded import Guarded
from vllm_spec_plugins.kernels import ngram_pool
from vllm_spec_plugins.proposers.pool import NgramPool

# buckets, ways, length of the n-grams, n-grams at once, tokens: few tokens make full buckets and repetitions.
SHAPES = [
    (1, 3, 2, 4, 3),
    (4, 4, 3, 1, 12),
    (4, 2, 5, 9, 12),
    (64, 7, 4, 15, 250_000),
    (8, 1, 6, 3, 5),
    (16, 5, 3, 17, 9),
]


def some_ngrams(rng: torch.Generator, pools: int, many: int, ngram: int, tokens: int) -> tuple[Tensor, Tensor]:
    ngrams = torch.randint(min(tokens, 3), (pools, many, ngram), generator=rng)
    ngrams[:, :, 0] = torch.randint(tokens, (pools, many), generator=rng)
    return ngrams, torch.rand(pools, many, generator=rng) < 0.7


@pytest.mark.parametrize(("buckets", "ways", "ngram", "many", "tokens"), SHAPES)
def test_pools_hold_and_find_what_the_plain_ones_do(
    buckets: int, ways: int, ngram: int, many: int, tokens: int, rng: torch.Generator
) -> None:
    pool, memory = NgramPool(5, buckets, ways, ngram, torch.device("cpu")), Guarded(rng)
    entries = memory.holding(pool.entries)
    for _ in range(3):
        rows = torch.randperm(5, generator=rng)[:3]
        ngrams, valid = some_ngrams(rng, 3, many, ngram, tokens)
        pool.insert(rows, ngrams, valid)
        ngram_pool.insert(entries, rows, ngrams, valid)
        assert torch.equal(entries, pool.entries)

        rows = torch.randint(5, (7,), generator=rng)
        key = torch.randint(tokens, (7,), generator=rng)
        key[:3] = ngrams[:, 0, 0]
        found = ngram_pool.lookup(entries, rows, key, memory((7, ways, ngram - 1), torch.int64))
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
