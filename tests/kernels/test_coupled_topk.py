# SPDX-License-Identifier: Apache-2.0
"""Coupled children as a kernel: against its reference, against the loops of the CPU, and bit for bit against vLLM's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.kernels.cases import Cases
from tests.kernels.guarded import guards_hold, poisoned
from vllm_spec_plugins.cpu import interpreted
from vllm_spec_plugins.cpu.kernels.noise import gumbel_topk
from vllm_spec_plugins.kernels import coupled_topk as module
from vllm_spec_plugins.kernels.coupled_topk import MOST_CHILDREN, coupled_topk, coupled_topk_reference

INF = float("inf")


def pick(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))


def requests(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures [n], some of them 0 and 1, seeds [n] of all 64 bits, positions [n]."""
    heat = torch.tensor([0.0, 1.0, 0.7, 1.3, 0.05])[torch.randint(5, (n,), generator=rng)]
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=rng)
    return heat, seeds, torch.randint(1 << 20, (n,), generator=rng)


def random_logits(n: int, vocab_size: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Few distinct values, so that greedy rows have ties; some -inf, as filters leave them, and both zeros."""
    logits = (torch.randn(n, vocab_size, generator=rng) * 3).to(dtype)
    coarse = torch.rand(n, generator=rng) < 0.5
    logits = logits.where(~coarse.unsqueeze(1), logits.round())  # -0.0 too
    return logits.masked_fill(torch.rand(n, vocab_size, generator=rng) < 0.1, -INF)


def agree(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Scores within 1e-5, tokens the same except where two scores are so close that rounding may order them."""
    (tokens, scores), (right, values) = got, expected
    near = torch.isclose(scores, values, rtol=1e-5, atol=1e-5)
    gap = values[:, :-1] - values[:, 1:]
    close = ~(gap > 1e-4)  # two -inf have none
    unclear = pad(close, (1, 0)) | pad(close, (0, 1), value=True)  # behind the last one stands one that is not listed
    return bool((near & ((tokens == right) | unclear)).all())


def test_random_rows_are_ranked_as_the_reference_ranks_them(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_VOCAB", 64)  # many blocks for few tokens
    for draw in cases(module.block_topk_kernel, module.merge_topk_kernel):
        dtype, count = draw.one_of(torch.float32, torch.bfloat16, torch.float16), draw.number(1, 16)
        n, vocab_size = draw.number(1, 6), draw.number(count, 300)
        # Sometimes more children than fit one merge, which are merged in several.
        monkeypatch.setattr(module, "BLOCK_PARTIAL", draw.one_of(4096, 4096, 64))
        logits = random_logits(n, vocab_size + 3, dtype, rng)[:, :vocab_size]
        heat, seeds, position = requests(n, rng)
        scaled, coupled = draw.flip(), draw.number(0, 3) > 0
        rows = None
        if draw.flip():  # lines of fewer requests
            rows = torch.randint(n, (n,), generator=rng).to(draw.one_of(torch.int32, torch.int64))
        blocks = -(-vocab_size // 64)
        tokens, scores, partial = (
            poisoned(shape, dtype, rng)
            for shape, dtype in (
                ((n, count), torch.int64),
                ((n, count), torch.float32),
                ((n, blocks, count), torch.int64),
            )
        )
        given = logits, heat, seeds, position, count, rows
        got = coupled_topk(*given, scaled=scaled, coupled=coupled, out=(tokens, scores), partial=partial)
        assert got[0] is tokens and got[1] is scores
        assert guards_hold(tokens) and guards_hold(scores) and guards_hold(partial)
        expected = coupled_topk_reference(*given, scaled=scaled, coupled=coupled)
        assert agree(got, expected)
        exact = (heat if rows is None else heat[rows.long()]) == 0 if coupled else torch.ones(n, dtype=torch.bool)
        assert torch.equal(tokens[exact], expected[0][exact])


@pytest.mark.parametrize(("count", "vocab_size", "block"), [(20, 200, 64), (70, 250, 256)])
def test_more_children_than_fit_one_merge_are_merged_in_several(
    count: int, vocab_size: int, block: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_VOCAB", 64)
    monkeypatch.setattr(module, "BLOCK_PARTIAL", block)
    logits = random_logits(2, vocab_size, torch.float32, rng)
    heat, seeds, position = requests(2, rng)
    heat[0] = 0.8
    got = coupled_topk(logits, heat, seeds, position, count)
    assert agree(got, coupled_topk_reference(logits, heat, seeds, position, count))
    got = coupled_topk(logits, heat, seeds, position, count, coupled=False)
    expected = coupled_topk_reference(logits, heat, seeds, position, count, coupled=False)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_rows_of_one_request_read_its_temperature_and_seed_by_index(rng: torch.Generator) -> None:
    heat, seeds, _ = requests(4, rng)
    rows = torch.tensor([3, 0, 0, 2, 1], dtype=torch.int32)
    logits, position = torch.randn(5, 50, generator=rng), torch.arange(5)
    got = coupled_topk(logits, heat, seeds, position, 4, rows)
    expected = coupled_topk(logits, heat[rows.long()], seeds[rows.long()], position, 4)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert agree(got, coupled_topk_reference(logits, heat, seeds, position, 4, rows.long()))


def test_the_loops_of_the_cpu_give_the_same_tokens_and_scores(rng: torch.Generator) -> None:
    for _ in range(6):
        n, count, vocab_size = pick(1, 4, rng), pick(1, 16, rng), pick(20, 1500, rng)
        logits = random_logits(n, vocab_size, torch.float32, rng)
        heat, seeds, position = requests(n, rng)
        got = coupled_topk(logits, heat, seeds, position, count, scaled=True)
        right, sums = gumbel_topk(logits.numpy(), heat.numpy(), seeds.numpy(), position.numpy(), count)
        scale = np.where(heat.numpy() > 0, heat.numpy(), np.float32(1.0))
        assert agree(got, (torch.from_numpy(right), torch.from_numpy(sums * scale[:, None])))
        greedy = heat == 0
        assert torch.equal(got[0][greedy], torch.from_numpy(right)[greedy])


@pytest.fixture(scope="module")
def gumbel() -> Any:
    """vLLM's sampler, its own kernels interpreted."""
    interpreted.enable()
    from vllm.v1.worker.gpu.sample import gumbel

    return gumbel


def sums_of_vllm(gumbel: Any, logits: Tensor, heat: Tensor, seeds: Tensor, position: Tensor) -> Tensor:
    """[n, V] float32: what vLLM's kernel takes the maximum of, one token a block."""
    n, vocab_size = logits.shape
    index, sums = torch.zeros(n, vocab_size, dtype=torch.int64), torch.full((n, vocab_size), float("nan"))
    gumbel._gumbel_sample_kernel[(n, vocab_size)](
        index,
        index.stride(0),
        sums,
        sums.stride(0),
        None,
        0,
        0,
        None,
        None,
        0,
        logits,
        logits.stride(0),
        torch.arange(n, dtype=torch.int32),
        seeds,
        position,
        heat,
        vocab_size,
        BLOCK_SIZE=1,
        IS_DRAFTING=False,
        APPLY_TEMPERATURE=True,
        USE_FP64=False,
        PER_TOKEN_COL=False,
    )
    return sums


def test_the_sums_are_those_of_vllms_sampler_bit_for_bit(
    gumbel: Any, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_VOCAB", 16)
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(3, 24, dtype, rng)
        heat, seeds, position = requests(3, rng)
        heat[:2] = torch.tensor([1.0, 0.6])
        sums = sums_of_vllm(gumbel, logits, heat, seeds, position)
        values, right = sums.sort(dim=1, descending=True, stable=True)
        tokens, scores = coupled_topk(logits, heat, seeds, position, 16)
        assert torch.equal(tokens, right[:, :16])
        scale = heat.where(heat > 0, 1.0).unsqueeze(1)
        assert torch.equal(scores, values[:, :16] * scale)


def test_the_first_child_is_the_token_that_vllms_sampler_draws(gumbel: Any, rng: torch.Generator) -> None:
    for _ in range(2):
        n, vocab_size = pick(3, 5, rng), pick(1000, 2500, rng)
        logits = random_logits(n, vocab_size, torch.float32, rng)
        heat, seeds, position = requests(n, rng)
        drawn = gumbel.gumbel_sample(logits, torch.arange(n), heat, seeds, position, True, False)
        tokens, _ = coupled_topk(logits, heat, seeds, position, 2)
        assert torch.equal(tokens[:, 0], drawn)
        # After vLLM's own temperature kernel, in place, as the engine calls it.
        gumbel.apply_temperature(logits, torch.arange(n), heat)
        assert torch.equal(coupled_topk(logits, heat, seeds, position, 2, scaled=True)[0], tokens)
        # A control: the stream that vLLM drafts with is another one.
        hot = torch.full_like(heat, 2.0)
        theirs = gumbel.gumbel_sample(logits, torch.arange(n), hot, seeds, position, True, True)
        assert not torch.equal(coupled_topk(logits, hot, seeds, position, 1)[0][:, 0], theirs)


def test_equal_scores_go_to_the_lower_token_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_VOCAB", 16)
    logits = torch.zeros(3, 50)
    logits[0, [3, 40]] = 2.0
    logits[1, ::2] = -0.0  # equal to 0.0
    logits[2] = -INF
    logits[2, 30], logits[2, 5] = -1.0, float("nan")
    none = torch.zeros(3, dtype=torch.int64)
    tokens, scores = coupled_topk(logits, torch.zeros(3), none, none, 5)
    assert tokens.tolist() == [[3, 40, 0, 1, 2], [0, 1, 2, 3, 4], [30, 0, 1, 2, 3]]
    assert scores.tolist() == [[2, 2, 0, 0, 0], [0] * 5, [-1, -INF, -INF, -INF, -INF]]


def test_what_the_kernel_cannot_rank_is_refused() -> None:
    logits, heat, number = torch.zeros(2, 200), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    for count in (0, MOST_CHILDREN + 1):
        with pytest.raises(AssertionError, match="of 200 tokens"):
            coupled_topk(logits, heat, number, number, count)
    with pytest.raises(AssertionError, match="5 of 4 tokens"):
        coupled_topk(logits[:, :4], heat, number, number, 5)
    for broken in (
        (logits.T.contiguous().T, heat, number, number),
        (logits.double(), heat, number, number),
        (logits, heat[:1], number, number),
        (logits, heat, number.int(), number),
        (logits, heat, number, number[:1]),
    ):
        with pytest.raises(AssertionError):
            coupled_topk(*broken, 2)
    assert coupled_topk(logits[:0], heat[:0], number[:0], number[:0], 2)[0].shape == (0, 2)


def test_the_comparison_notices_noise_of_another_position(rng: torch.Generator) -> None:
    """A control for `agree`."""
    logits, heat = torch.randn(6, 200, generator=rng), torch.ones(6)
    _, seeds, position = requests(6, rng)
    got = coupled_topk(logits, heat, seeds, position + 1, 4)
    assert not agree(got, coupled_topk_reference(logits, heat, seeds, position, 4))
