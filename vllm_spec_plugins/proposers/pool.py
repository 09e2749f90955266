# SPDX-License-Identifier: Apache-2.0
"""N-gram pools: what followed a token the last few times, in memory that never grows."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for

_SPREAD = 0x9E3779B1  # 2^32 / golden ratio: neighbouring token ids fall into distant buckets
_MIX = 0x2545F4914F6CDD1D


class NgramPool:
    """A set-associative cache of n-grams per row: a token's bucket holds the `ways` n-grams used last.

    An n-gram's key is its first token. Tokens that share a bucket share its ways. Memory is fixed:
    rows * (buckets + 1) * ways * ngram * 4 bytes (32 requests, 512 buckets of 7 5-grams: 2.3 MB).

    Args:
        rows: independent pools.
        buckets: a power of two.
        ways: n-grams per bucket.
        ngram: tokens per n-gram, the key included.
    """

    def __init__(self, rows: int, buckets: int, ways: int, ngram: int, device: torch.device) -> None:
        if buckets < 1 or buckets & (buckets - 1):
            raise ValueError(f"buckets must be a power of two, got {buckets}")
        self.buckets, self.ways, self.ngram = buckets, ways, ngram
        # The last bucket takes what is not to be stored and is never looked up. Most recently used first.
        self.entries = torch.full((rows, buckets + 1, ways, ngram), -1, dtype=torch.int32, device=device)
        self._weights = torch.ones(ngram, dtype=torch.int64, device=device)
        for k in range(1, ngram):
            self._weights[k:] *= _MIX

    def clear(self, row: int) -> None:
        """Empty one pool."""
        self.entries[row].fill_(-1)

    def _bucket(self, key: Tensor) -> Tensor:
        return (key * _SPREAD >> 12) & (self.buckets - 1)

    def lookup(self, rows: Tensor, key: Tensor) -> Tensor:
        """[B, ways, ngram - 1] int64: what followed `key` [B] in the pools `rows` [B], last used first, -1 = none."""
        if kernels_for(key):
            from vllm_spec_plugins.kernels import ngram_pool

            return ngram_pool.lookup(self.entries, rows, key)
        ways = self.entries[rows, self._bucket(key)].long()
        return ways[:, :, 1:].masked_fill(ways[:, :, :1] != key.view(-1, 1, 1), -1)

    def insert(self, rows: Tensor, ngrams: Tensor, valid: Tensor) -> None:
        """Store n-grams as the most recently used of their buckets; what is there already moves to the front.

        The result is that of inserting them one after the other, the last of a row first, so that ngrams[:, 0] is the
        most recent. N-grams of one bucket all compute that bucket's new content and write the same values.

        Args:
            rows: [P] int64, distinct.
            ngrams: [P, M, ngram] int64.
            valid: [P, M] bool, which of them to store.
        """
        if kernels_for(ngrams):
            from vllm_spec_plugins.kernels import ngram_pool

            ngram_pool.insert(self.entries, rows, ngrams.contiguous(), valid.contiguous())
            return
        pools, many, _ = ngrams.shape
        bucket = self._bucket(ngrams[:, :, 0]).masked_fill_(~valid, self.buckets)  # [P, M]
        where = (rows.unsqueeze(1), bucket)
        ways = self.entries[where].long()  # [P, M, G, n]
        name, known = (ngrams * self._weights).sum(-1), (ways * self._weights).sum(-1)  # equal n-grams, equal names

        # Of equal new ones the first stays; of the old ones those that are not among the new.
        twin = (name.unsqueeze(2) == name.unsqueeze(1)) & valid.unsqueeze(1)  # [P, M, M]
        lone = valid & ~twin.tril(-1).any(2)
        fresh = (bucket.unsqueeze(2) == bucket.unsqueeze(1)) & lone.unsqueeze(1)
        again = ((known.unsqueeze(3) == name.view(pools, 1, 1, many)) & valid.view(pools, 1, 1, many)).any(3)
        keep = torch.cat((fresh, ~again & (ways[..., 0] >= 0)), 2)  # [P, M, M + G], most recently used first
        rank = keep.cumsum(2) - 1
        place = rank.masked_fill_(~keep | (rank >= self.ways), self.ways)
        candidates = torch.cat((ngrams.unsqueeze(1).expand(-1, many, -1, -1), ways), 2)
        new = torch.full_like(ways[:, :, :1], -1).repeat(1, 1, self.ways + 1, 1)
        new.scatter_(2, place.unsqueeze(3).expand_as(candidates), candidates)
        self.entries[where] = new[:, :, : self.ways].to(torch.int32)
