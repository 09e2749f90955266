# SPDX-License-Identifier: Apache-2.0
"""Random batches for the kernels that feed vLLM's draft models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as standalone
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator as dependent

from tests.unit.cpu.parity import Draw, Tensor, case, starts

MAX_NUM_REQS, MAX_MODEL_LEN = 6, 40


class Batch:
    def __init__(self, draw: Draw) -> None:
        self.num_reqs = draw.int(1, MAX_NUM_REQS)
        lengths = draw.ints(1, 7, self.num_reqs)
        self.query_start_loc = starts(lengths)
        self.num_rejected = (draw.uniform(0, 1, self.num_reqs) * lengths).int()
        total = int(lengths.sum())
        self.input_ids = draw.ints(0, 99, total)
        self.positions = draw.ints(0, MAX_MODEL_LEN - 1, total, dtype=torch.int64)
        self.seq_lens = draw.ints(7, MAX_MODEL_LEN, self.num_reqs)
        self.idx_mapping = draw.states(self.num_reqs, MAX_NUM_REQS)
        self.last_sampled = draw.ints(100, 199, MAX_NUM_REQS, 1, dtype=torch.int64)
        self.total = total


def _poison(shape: tuple[int, ...] | int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full((shape,) if isinstance(shape, int) else shape, -7, dtype=dtype)


def _buffers(draw: Draw) -> SimpleNamespace:
    return SimpleNamespace(
        input_ids=_poison(64),
        positions=draw.ints(0, MAX_MODEL_LEN - 1, 64, dtype=torch.int64),
        query_start_loc=_poison(MAX_NUM_REQS + 1),
        seq_lens=draw.ints(1, MAX_MODEL_LEN, MAX_NUM_REQS),
    )


@case("spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel")
def prefill_of_a_standalone_drafter(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    outputs = (
        _poison(b.total + b.num_reqs + 2),
        _poison(b.total + b.num_reqs + 2, torch.int64),
        _poison(MAX_NUM_REQS, torch.int64),
        _poison(MAX_NUM_REQS + 1),
        _poison(MAX_NUM_REQS),
    )
    standalone._prepare_prefill_inputs_kernel[(b.num_reqs,)](
        b.input_ids,
        b.positions,
        b.last_sampled,
        b.idx_mapping,
        *outputs,
        b.query_start_loc,
        b.seq_lens,
        b.num_rejected,
        MAX_NUM_REQS,
        MAX_MODEL_LEN,
        BLOCK_SIZE=4,
    )
    return outputs


@case("spec_decode.target_dependent_ar.speculator._prepare_prefill_inputs_kernel")
def prefill_of_a_drafter_on_hidden_states(draw: Draw) -> tuple[Any, ...]:
    b, buffers = Batch(draw), _buffers(draw)
    last_token_indices, step = _poison(MAX_NUM_REQS, torch.int64), torch.tensor([3])
    dependent.prepare_prefill_inputs(
        last_token_indices,
        step,
        buffers,
        b,
        draw.ints(0, 1, b.num_reqs),
        b.num_rejected,
        b.last_sampled,
        draw.ints(200, 299, MAX_NUM_REQS),
        MAX_NUM_REQS,
    )
    return last_token_indices, step, *vars(buffers).values()


@case("spec_decode.target_dependent_ar.speculator._prepare_decode_inputs_kernel")
def second_drafting_step(draw: Draw) -> tuple[Any, ...]:
    b, buffers = Batch(draw), _buffers(draw)
    drafts, sample_positions = draw.ints(0, 99, b.num_reqs, dtype=torch.int64), draw.ints(0, 9, MAX_NUM_REQS)
    dependent.prepare_decode_inputs(
        drafts, b.seq_lens, b.num_rejected, buffers, sample_positions, MAX_MODEL_LEN, MAX_NUM_REQS, draw.flag()
    )
    return sample_positions, *vars(buffers).values()


@case("spec_decode.target_dependent_ar.speculator._update_draft_inputs_kernel")
def later_drafting_steps(draw: Draw) -> tuple[Any, ...]:
    b, buffers = Batch(draw), _buffers(draw)
    dtype = (torch.float32, torch.bfloat16)[draw.int(0, 1)]
    hidden, following = draw.floats(b.num_reqs, 24).to(dtype), torch.zeros(MAX_NUM_REQS, 24, dtype=dtype)
    output, sample_positions = _poison((MAX_NUM_REQS, 4), torch.int64), draw.ints(0, 9, MAX_NUM_REQS)
    dependent.update_draft_inputs(
        draw.ints(0, 99, b.num_reqs, dtype=torch.int64),
        torch.tensor([draw.int(0, 3)]),
        hidden,
        output,
        following,
        buffers,
        sample_positions,
        b.num_reqs,
        MAX_MODEL_LEN,
        4,
        draw.flag(),
    )
    return output, following, sample_positions, *vars(buffers).values()
