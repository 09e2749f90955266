# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_spec_plugins.proposers.pool import NgramPool


class NaivePool:
    """Lists per bucket, most recently used first, one insertion at a time."""

    def __init__(self, ways, bucket_of):
        self.ways, self.bucket_of, self.lists = ways, bucket_of, {}

    def insert(self, ngram):
        bucket = self.lists.setdefault(self.bucket_of(ngram[0]), [])
        if ngram in bucket:
            bucket.remove(ngram)
        bucket.insert(0, ngram)
        del bucket[self.ways :]

    def lookup(self, key):
        return [ngram[1:] for ngram in self.lists.get(self.bucket_of(key), []) if ngram[0] == key]


@pytest.mark.parametrize(
    ("buckets", "ways", "ngram", "many"), [(1, 3, 2, 4), (4, 4, 3, 1), (4, 2, 5, 9), (64, 7, 4, 15)]
)
def test_inserting_at_once_equals_inserting_one_after_the_other(buckets, ways, ngram, many, rng):
    pool = NgramPool(5, buckets, ways, ngram, torch.device("cpu"))
    naive = [NaivePool(ways, lambda key: int(pool._bucket(torch.tensor(key)))) for _ in range(5)]
    for _ in range(40):
        rows = torch.randperm(5, generator=rng)[:3]
        ngrams = torch.randint(3, (3, many, ngram), generator=rng)
        ngrams[:, :, 0] = torch.randint(12, (3, many), generator=rng)
        valid = torch.rand(3, many, generator=rng) < 0.7
        pool.insert(rows, ngrams, valid)
        for row, batch, ok in zip(rows.tolist(), ngrams.tolist(), valid.tolist(), strict=True):
            for one, real in zip(reversed(batch), reversed(ok), strict=True):
                if real:
                    naive[row].insert(one)
        for key in range(12):
            found = pool.lookup(rows, torch.full((3,), key))
            assert found.shape == (3, ways, ngram - 1)
            for row, got in zip(rows.tolist(), found.tolist(), strict=True):
                assert [entry for entry in got if entry[0] >= 0] == naive[row].lookup(key)


def test_repeated_insertion_moves_to_the_front_and_changes_nothing_else():
    pool = NgramPool(1, 8, 3, 3, torch.device("cpu"))
    row, key = torch.tensor([0]), torch.tensor([5])
    for tail in ([1, 2], [3, 4], [1, 2], [1, 2], [1, 2]):
        pool.insert(row, torch.tensor([[[5, *tail]]]), torch.tensor([[True]]))
    assert pool.lookup(row, key).tolist() == [[[1, 2], [3, 4], [-1, -1]]]
    pool.clear(0)
    assert pool.lookup(row, key).eq(-1).all()


def test_memory_is_fixed_and_large_token_ids_are_kept(rng):
    pool = NgramPool(2, 16, 3, 4, torch.device("cpu"))
    size = pool.entries.nbytes
    assert size == 2 * 17 * 3 * 4 * 4
    for _ in range(50):
        pool.insert(torch.tensor([1]), torch.randint(250_000, (1, 20, 4), generator=rng), torch.ones(1, 20) > 0)
    last = torch.tensor([[[249_999, 7, 249_998, 0]]])
    pool.insert(torch.tensor([1]), last, torch.tensor([[True]]))
    assert pool.lookup(torch.tensor([1]), torch.tensor([249_999]))[0, 0].tolist() == [7, 249_998, 0]
    assert pool.entries[0].eq(-1).all()
    assert pool.entries.nbytes == size


def test_the_number_of_buckets_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="power of two, got 12"):
        NgramPool(1, 12, 3, 4, torch.device("cpu"))
