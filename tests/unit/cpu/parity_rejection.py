# SPDX-License-Identifier: Apache-2.0
"""Random drafts for vLLM's rejection sampler and its n-gram lookup."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.ngram import speculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from tests.unit.cpu.parity import Draw, case, starts

MAX_NUM_REQS, STEPS = 6, 4
_UTILS = "spec_decode.rejection_sampler_utils."
_ALWAYS = tuple(
    _UTILS + name
    for name in (
        "_compute_local_logits_stats_kernel",
        "_rejection_kernel",
        "_resample_kernel",
        "_insert_resampled_kernel",
    )
)


def _verify(
    draw: Draw, block: bool = False, synthetic: bool = False, fp64: bool = False, one_hot: bool | None = None
) -> Any:
    vocab_size = (draw.int(8, 60), draw.int(8200, 9000))[draw.int(0, 3) == 0]
    states = draw.states(draw.int(1, MAX_NUM_REQS), MAX_NUM_REQS)
    counts = draw.ints(1, STEPS + 1, len(states))
    expanded = states.repeat_interleave(counts)
    local = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in counts])
    rows = len(expanded)
    target = draw.floats(rows, vocab_size, scale=0.7)
    target[draw.uniform(0, 1, rows, vocab_size) < 0.1] = float("-inf")
    target[:, 0] = 1.0
    drafted = draw.ints(0, min(vocab_size, 8) - 1, rows)
    best = target.roll(1, 0).argmax(1)
    # Half of the drafts are what a greedy target would take, some are placeholders.
    drafted = torch.where(draw.uniform(0, 1, rows) < 0.5, best.int(), drafted)
    drafted[draw.uniform(0, 1, rows) < 0.1] = -1
    given = draw.flag() if one_hot is None else not one_hot
    draft_logits = draw.floats(MAX_NUM_REQS, STEPS, vocab_size, scale=0.7) if given else None
    sampled, num_sampled = rejection_sample(
        target,
        draft_logits,
        drafted,
        starts(counts),
        draw.ints(0, 99, rows, dtype=torch.int64),
        states,
        expanded,
        local,
        draw.choice([0.0, 1.0, 0.7], MAX_NUM_REQS),
        draw.ints(-(2**62), 2**62, MAX_NUM_REQS, dtype=torch.int64),
        STEPS,
        draw.uniform(0, 1, STEPS) if synthetic else None,
        fp64,
        block,
    )
    # What stands behind a request's tokens is read by nobody.
    used = torch.arange(STEPS + 1) < num_sampled[:, None]
    return sampled.masked_fill(~used, -5), num_sampled


@case(*_ALWAYS)
def ratio_test(draw: Draw) -> tuple[Any, ...]:
    return _verify(draw)


@case(*_ALWAYS)
def ratio_test_in_double_precision(draw: Draw) -> tuple[Any, ...]:
    return _verify(draw, fp64=True)


@case(*_ALWAYS)
def synthetic_acceptance(draw: Draw) -> tuple[Any, ...]:
    return _verify(draw, synthetic=True)


@case(*_ALWAYS, _UTILS + "_compute_cumulative_log_p_kernel", _UTILS + "_compute_local_residual_mass_kernel")
def block_verification(draw: Draw) -> tuple[Any, ...]:
    return _verify(draw, block=True, one_hot=False)


@case(*_ALWAYS, _UTILS + "_compute_cumulative_log_p_kernel")
def block_verification_of_one_hot_drafts(draw: Draw) -> tuple[Any, ...]:
    return _verify(draw, block=True, one_hot=True)


@case("spec_decode.rejection_sampler._flatten_sampled_kernel")
def flattened_samples(draw: Draw) -> tuple[Any, ...]:
    counts = draw.ints(1, STEPS + 1, draw.int(1, MAX_NUM_REQS))
    num_sampled = (draw.uniform(0, 1, len(counts)) * (counts + 1)).int()
    sampled = draw.ints(0, 99, len(counts), STEPS + 1, dtype=torch.int64)
    flat = torch.full((int(counts.sum()),), -3, dtype=torch.int64)
    rejection_sampler._flatten_sampled_kernel[(len(counts),)](
        flat, sampled, sampled.stride(0), num_sampled, starts(counts), num_warps=1
    )
    return (flat,)


@case("spec_decode.ngram.speculator._ngram_scan_kernel")
def ngram_matches(draw: Draw) -> tuple[Any, ...]:
    length, block, blocks = 60, 16, 4
    states = draw.states(draw.int(1, MAX_NUM_REQS), MAX_NUM_REQS)
    scratch = torch.full((MAX_NUM_REQS, blocks), -3, dtype=torch.int64)
    smallest = draw.int(1, 3)
    largest = smallest + draw.int(0, 2)
    speculator._ngram_scan_kernel[(len(states), blocks)](
        draw.ints(0, 2, MAX_NUM_REQS, length),
        length,
        states,
        draw.ints(0, length, MAX_NUM_REQS),
        draw.ints(0, 2, len(states)),
        scratch,
        blocks,
        length,
        smallest,
        largest,
        1 << (largest - 1).bit_length(),
        block,
        num_warps=4,
        num_stages=2,
    )
    return (scratch,)


@case("spec_decode.ngram.speculator._ngram_scan_kernel", "spec_decode.ngram.speculator._ngram_finalize_kernel")
def ngram_drafts(draw: Draw) -> tuple[Any, ...]:
    length, block, blocks, drafted = 60, 16, 4, draw.int(1, 5)
    states = draw.states(draw.int(1, MAX_NUM_REQS), MAX_NUM_REQS)
    tokens = draw.ints(0, 3, MAX_NUM_REQS, length)
    total, num_sampled = draw.ints(0, length, MAX_NUM_REQS), draw.ints(0, 2, len(states))
    scratch = torch.full((MAX_NUM_REQS, blocks), -3, dtype=torch.int64)
    drafts = torch.full((MAX_NUM_REQS, drafted), -3, dtype=torch.int64)
    last = draw.ints(100, 199, MAX_NUM_REQS, dtype=torch.int64)
    speculator._ngram_scan_kernel[(len(states), blocks)](
        tokens, length, states, total, num_sampled, scratch, blocks, length, 2, 3, 4, block
    )
    speculator._ngram_finalize_kernel[(len(states),)](
        tokens, length, states, total, num_sampled, last, scratch, blocks, drafts, length, blocks, drafted, 8, 4
    )
    return scratch, drafts
