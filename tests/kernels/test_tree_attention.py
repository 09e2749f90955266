# SPDX-License-Identifier: Apache-2.0
"""Tree attention against its plain version. Whatever a row must not read is poison: NaN, or a block that is not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.cases import Cases
from vllm_spec_plugins.kernels import tree_attention as module
from vllm_spec_plugins.kernels.tree_attention import Scratch, reference, tree_attention

ABSENT = torch.iinfo(torch.int32).max
NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


# Pairs that fill up a tile saw nothing: 0 / 0, which is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies the bits of bfloat16 matrices; let it multiply their values."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@dataclass
class Case:
    """Arguments of one call, and which rows it must write."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    out: Tensor
    written: Tensor
    arguments: dict[str, Any]
    features: set[str] = field(default_factory=set)

    def run(self, **changed: Any) -> Tensor:
        out = self.out.clone()
        tree_attention(self.query, self.key_cache, self.value_cache, out, **{**self.arguments, **changed})
        return out

    def expected(self) -> Tensor:
        out = self.out.float()
        reference(self.query, self.key_cache, self.value_cache, out, **self.arguments)
        return out


def as_words(sees: Tensor, count: int) -> Tensor:
    """[R, count] int64 of [R, S] bool."""
    bits = torch.zeros(len(sees), count * 64, dtype=torch.bool)
    bits[:, : sees.shape[1]] = sees
    return (bits.view(-1, count, 64).long() << torch.arange(64)).sum(-1)


def random_case(rng: torch.Generator, **wanted: Any) -> Case:
    """A random call; `wanted` settles what shall not be drawn."""

    def draw(name: str, *choices: Any) -> Any:
        value = wanted.get(name, choices[int(torch.randint(len(choices), (1,), generator=rng))])
        features.add(f"{name}={value}")
        return value

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    features: set[str] = set()
    dtype = draw("dtype", torch.float32, torch.float16, torch.bfloat16)
    cache_dtype = draw("cache", dtype, dtype, *FP8)
    dim, groups = draw("dim", 32, 64, 80, 96, 128, 256), draw("groups", 1, 1, 1, 2)
    per_group, size = draw("per_group", 1, 2, 3, 4, 7, 8), draw("size", 16, 32, 48)
    words, batch = draw("words", 1, 1, 2, 3, 4), draw("batch", 1, 2, 3)
    window = draw("window", 0, 0, 0, 257, 300)
    heads = groups * per_group

    # Trees, ancestors first, and of each either all rows, some, or none.
    prefix, behind, counts, sees, depths = [], [], [], [], []
    for _ in range(batch):
        tree = number(1, 12) if number(0, 2) else number(64 * words - 20, 64 * words)
        reach = torch.eye(tree, dtype=torch.bool)
        for row in range(1, tree):
            reach[row] |= reach[number(max(0, row - 5), row - 1)]
        share = draw("share", 1.0, 1.0, 0.3, 0.0) if tree <= 12 else 7 / tree
        rows = torch.rand(tree, generator=rng) < share
        counts.append(int(rows.sum()))
        sees.append(as_words(reach[rows], words))
        depths.append(reach[rows].sum(1) - 1)
        behind.append(tree)
        context = draw("context", 0, number(1, 40), number(1, 3) * size, number(70, 110))
        prefix.append(context + (window + number(-30, 60) if window and number(0, 3) else 0))
    first = number(0, 2) * number(0, 1)
    start = torch.tensor([first, *counts]).cumsum(0)
    rows, total = int(start[-1]), int(start[-1]) + 3

    # Every request its own blocks; the rest of the cache is poison, as is what a request's last block holds behind it.
    needed = [-(-(a + b) // size) for a, b in zip(prefix, behind, strict=True)]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, generator=rng).split([*needed, 2])
    table = torch.full((batch, max(needed) + 2), ABSENT)
    content = torch.randn(blocks, groups, size, 2 * dim, generator=rng)
    content[order[-1]] = NAN
    for b in range(batch):
        low = max(0, prefix[b] - window + 1) if window else 0
        table[b, low // size : needed[b]] = order[b][low // size :]
        content[order[b][-1], :, prefix[b] + behind[b] - (needed[b] - 1) * size :] = NAN
        content[order[b][: low // size]] = NAN
        if low:
            content[order[b][low // size], :, : low % size] = NAN
    cache = content.to(cache_dtype)
    if draw("layout", "NHD", "HND") == "NHD":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    key_cache, value_cache = cache.transpose(1, 2).split(dim, -1)

    # A query as a projection leaves it, keys and values behind it in every row.
    query = torch.full((total, heads + 2 * groups, dim), NAN)
    query[first:rows, :heads] = torch.randn(rows - first, heads, dim, generator=rng)
    splits = draw("splits", 1, 1, 2, 3, 8)
    scratch = Scratch.empty(total, heads, splits, dim, "cpu") if draw("scratch", True, False) else None
    if scratch is not None:
        for tensor in (scratch.partial, scratch.peak, scratch.total):
            tensor.fill_(NAN)
    scaled = cache_dtype in FP8
    depth = torch.full((total,), ABSENT)
    depth[first:rows] = torch.cat(depths)
    sees = torch.cat([torch.full((first, words), -1), *sees, torch.full((total - rows, words), -1)])
    arguments = {
        "start": start.int(),
        "prefix": torch.tensor(prefix, dtype=torch.int32),
        "behind": torch.tensor(behind, dtype=torch.int32),
        "words": sees,
        "block_table": table.int(),
        "max_rows": max(counts) + number(0, 3),
        "scale": dim**-0.5 * (0.5, 1.0, 3.0)[number(0, 2)],
        "soft_cap": draw("soft_cap", 0.0, 0.0, 2.0, 30.0),
        "window": window,
        "depth": depth.int() if window else None,
        "k_scale": torch.tensor(0.7) if scaled else None,
        "v_scale": torch.tensor([1.3]) if scaled else None,
        "splits": splits,
        "scratch": scratch,
    }
    out = torch.full((total, heads, dim), NAN, dtype=dtype)
    written = (torch.arange(total) >= first) & (torch.arange(total) < rows)
    features |= {f"empty={0 in counts}", f"first={first > 0}", f"root={0 in prefix}"}
    return Case(query.to(dtype)[:, :heads], key_cache, value_cache, out, written, arguments, features)


def assert_right(case: Case, got: Tensor) -> None:
    want, tolerance = case.expected(), TOLERANCE[case.out.dtype]
    assert want[case.written].isfinite().all(), case.features
    torch.testing.assert_close(
        got[case.written].float(), want[case.written], rtol=tolerance, atol=tolerance, msg=lambda m: f"{m}\n{case}"
    )
    assert got[~case.written].isnan().all(), "a row of no request was written"


def test_random_calls_give_what_the_plain_version_gives(cases: Cases, rng: torch.Generator) -> None:
    met: set[str] = set()
    for draw in cases(module.tree_attention_kernel):
        case = random_case(rng)
        assert_right(case, case.run())
        draw.drawn.append(frozenset(case.features))
        met |= case.features
    needed = {
        "empty=True",
        "first=True",
        "root=True",
        "layout=NHD",
        "layout=HND",
        "window=257",
        "soft_cap=2.0",
        "splits=8",
    }
    assert needed <= met, f"these calls lack {needed - met}"


def test_random_numbers_of_parts_give_what_the_plain_version_gives(cases: Cases, rng: torch.Generator) -> None:
    """Short contexts, so that some parts hold nothing; the merge is what this is about."""
    for draw in cases(module.merge_kernel):
        splits, dtype = draw.number(2, 9), draw.one_of(torch.float32, torch.float16, torch.bfloat16)
        few: dict[str, Any] = {"batch": 1, "groups": 1, "per_group": draw.number(1, 4), "words": 1, "window": 0}
        few |= {"dtype": dtype, "cache": dtype, "dim": draw.one_of(32, 48, 64), "context": draw.number(0, 90)}
        case = random_case(rng, **few, splits=splits, share=draw.one_of(1.0, 0.5), scratch=draw.flip())
        assert_right(case, case.run())


@pytest.mark.parametrize("cache_dtype", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_of_eight_bits_is_read_with_its_scales(
    dtype: torch.dtype, cache_dtype: torch.dtype, rng: torch.Generator
) -> None:
    case = random_case(rng, dtype=dtype, cache=cache_dtype, dim=32, batch=2, window=0)
    assert_right(case, case.run())


def test_the_plain_version_is_attention_under_the_mask_of_the_tree(rng: torch.Generator) -> None:
    case = random_case(
        rng, dtype=torch.float32, cache=torch.float32, batch=1, groups=1, per_group=2, soft_cap=0.0, window=0, share=1.0
    )
    prefix, behind = int(case.arguments["prefix"]), int(case.arguments["behind"])
    size = case.key_cache.shape[1]
    place = torch.arange(prefix + behind)
    block = case.arguments["block_table"][0, place // size].long()
    sees = [[bool(int(row[j // 64]) >> j % 64 & 1) for j in range(behind)] for row in case.arguments["words"]]
    mask = torch.cat([torch.ones(len(sees), prefix, dtype=torch.bool), torch.tensor(sees)], 1)[case.written]
    key, value = (cache[block, place % size].transpose(0, 1) for cache in (case.key_cache, case.value_cache))
    query = case.query[case.written].transpose(0, 1)
    scale = case.arguments["scale"]
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key.expand(2, -1, -1), value.expand(2, -1, -1), attn_mask=mask, scale=scale
    )
    torch.testing.assert_close(case.expected()[case.written], want.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_one_bit_more_changes_its_row_and_no_other(rng: torch.Generator) -> None:
    case = random_case(
        rng, dtype=torch.float32, cache=torch.float32, dim=32, batch=1, soft_cap=0.0, context=5, share=1.0
    )
    case.arguments["words"] = words = case.arguments["words"].clone()
    rows = case.written.nonzero().flatten()
    row = int(rows[int(torch.randint(len(rows), (1,), generator=rng))])
    before = case.run()
    words[row, 0] ^= 1  # the root, which every row sees
    after = case.run()
    changed = (before != after).flatten(1).any(1) & case.written
    assert changed.nonzero().flatten().tolist() == [row]
    assert_right(case, after)


def test_poison_that_is_read_shows(rng: torch.Generator) -> None:
    """The control: a token too many, of which every row is told that it sees it."""
    case = random_case(rng, dtype=torch.float32, cache=torch.float32, dim=32, batch=1, window=0, size=48, share=1.0)
    full = (case.arguments["prefix"] + case.arguments["behind"]) % 48 == 0
    case.arguments["words"].fill_(-1)
    assert case.run()[case.written].isfinite().all()
    case.arguments["behind"] += 1
    if full:  # the next block is one that is not there
        case.arguments["block_table"][case.arguments["block_table"] == ABSENT] = 0
        case.key_cache[0].fill_(NAN)
    assert case.run()[case.written].isnan().all()


def test_parts_of_a_context_add_up_to_the_whole(rng: torch.Generator) -> None:
    case = random_case(
        rng, dtype=torch.float32, cache=torch.float32, batch=2, groups=1, per_group=2, scratch=False, share=1.0, words=1
    )
    whole = case.run(splits=1)
    torch.testing.assert_close(case.run(splits=32), whole, rtol=1e-5, atol=1e-5, equal_nan=True)
