# SPDX-License-Identifier: Apache-2.0
"""Random batches for the kernels that prepare inputs, keep block tables and update requests."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu import input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from tests.unit.cpu.parity import Draw, case, starts

CPU = torch.device("cpu")


class Batch:
    """Requests in every stage: prefilling in chunks, at the end of their prompt, decoding with drafts."""

    def __init__(self, draw: Draw, max_drafts: int = 5) -> None:
        self.max_num_reqs, self.width = draw.int(4, 12), 64
        self.num_reqs = draw.int(1, self.max_num_reqs)
        states = draw.states(self.num_reqs, self.max_num_reqs)
        self.states = states
        self.prefill_len = draw.ints(1, 30, self.max_num_reqs)
        self.computed = draw.ints(0, 40, self.max_num_reqs)
        prefilling = self.computed[states] < self.prefill_len[states]
        left = self.prefill_len[states] - self.computed[states]
        chunk = (draw.uniform(0, 1, self.num_reqs) * left).int() + 1
        drafts = draw.ints(0, max_drafts, self.num_reqs)
        self.lengths = torch.where(prefilling, torch.minimum(chunk, left.clamp(min=1)), drafts + 1).int()
        self.num_logits = torch.where(prefilling, 1, drafts + 1).int()
        self.query_start_loc = starts(self.lengths)
        self.cu_num_logits = starts(self.num_logits)
        self.num_tokens = int(self.query_start_loc[-1])
        self.seq_lens = self.computed[states] + self.lengths
        self.tokens = draw.ints(0, 999, self.max_num_reqs, self.width)
        self.drafts = draw.ints(0, 999, self.max_num_reqs, max_drafts, dtype=torch.int64)
        self.max_drafts = max_drafts


@case("buffer_utils._apply_write_kernel")
def staged_writes(draw: Draw) -> tuple[Any, ...]:
    outputs = []
    for size, dtype in (((6, 40), torch.int32), ((6, 40), torch.float32), (9, torch.int32)):
        tensor = StagedWriteTensor(size, dtype=dtype, device=CPU)
        tensor.gpu.copy_(draw.ints(-9, 9, *tensor.gpu.shape))
        # Rows apart: which of two programs that write one element comes last is nobody's promise.
        for row in draw.states(draw.int(1, 6), tensor.gpu.shape[0]).tolist():
            if isinstance(size, int):
                tensor.stage_write_elem(row, draw.int(0, 99))
            else:
                start = draw.int(0, 30)
                tensor.stage_write(row, start, draw.ints(0, 99, draw.int(1, 40 - start)).tolist())
        tensor.apply_write()
        outputs.append(tensor.gpu)
    return tuple(outputs)


@case("buffer_utils._apply_write_kernel", "block_table._gather_block_tables_kernel")
def block_tables_of_several_groups(draw: Draw) -> tuple[Any, ...]:
    tables = _filled_tables(draw, num_groups=draw.int(2, 3))
    states = draw.states(draw.int(1, 5), 6)
    gathered = tables.gather_block_tables(states, min(6, len(states) + draw.int(0, 2)))
    return (*(table.gpu for table in tables.block_tables), *tables.input_block_tables, *gathered)


@case("block_table._gather_block_tables_kernel")
def block_tables_of_one_group(draw: Draw) -> tuple[Any, ...]:
    tables = _filled_tables(draw, num_groups=1)
    states = draw.states(draw.int(1, 6), 6)
    gathered = tables.gather_block_tables(states, len(states))
    return (*tables.input_block_tables, *gathered)


@case("block_table._compute_slot_mappings_kernel")
def slot_mappings(draw: Draw) -> tuple[Any, ...]:
    groups = draw.int(1, 3)
    enabled = [draw.flag() for _ in range(groups)] if groups > 1 else [True]
    tables = _filled_tables(draw, groups, slot_mapping_enabled=enabled, full=True)
    states = draw.states(draw.int(1, 6), 6)
    states[draw.uniform(0, 1, len(states)) < 0.2] = -1
    lengths = draw.ints(1, 8, len(states))
    positions = draw.ints(0, 4 * 8 - 1, int(lengths.sum()), dtype=torch.int64)
    tables.slot_mappings.fill_(77)
    slots = tables.compute_slot_mappings(states, starts(lengths), positions, len(positions))
    return tables.slot_mappings, slots


def _filled_tables(draw: Draw, num_groups: int, full: bool = False, **settings: Any) -> BlockTables:
    sizes = [(4, 8, 16)[draw.int(0, 2)] for _ in range(num_groups)]
    columns = [4 * 8 // size + draw.int(1, 4) for size in sizes]
    tables = BlockTables(sizes, 6, 64, columns, CPU, **settings)
    for table in tables.input_block_tables:
        table.fill_(55)
    for request in range(6):
        blocks = tuple(draw.ints(1, 500, width if full else draw.int(1, width)).tolist() for width in columns)
        tables.append_block_ids(request, blocks, overwrite=True)
    tables.apply_staged_writes()
    return tables


@case("input_batch._prepare_prefill_inputs_kernel")
def prefill_inputs(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    input_ids = draw.ints(-9, -1, b.num_tokens + 3)
    following = draw.ints(-9, -1, draw.int(1, 4), b.max_num_reqs)
    input_batch.prepare_prefill_inputs(
        input_ids, following, b.states, b.query_start_loc, b.tokens, b.prefill_len, b.computed
    )
    return input_ids, following


@case("input_batch._prepare_pos_seq_lens_kernel")
def positions_and_lengths(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    positions = draw.ints(-9, -1, b.num_tokens + 3, dtype=torch.int64)
    seq_lens = draw.ints(-9, -1, b.max_num_reqs)
    input_batch.prepare_pos_seq_lens(b.states, b.query_start_loc, b.computed, positions, seq_lens)
    return positions, seq_lens


@case("input_batch._combine_sampled_and_draft_tokens_kernel")
def sampled_and_draft_tokens(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    fresh = draw.int(0, 1)
    num_logits = b.num_logits if fresh else (b.num_logits - 1).clamp(min=0)
    cu_num_logits = starts(num_logits)
    input_ids = draw.ints(-9, -1, b.num_tokens + 3)
    last = draw.ints(0, 999, b.max_num_reqs, 1, dtype=torch.int64)
    indices = input_batch.combine_sampled_and_draft_tokens(
        input_ids,
        b.states,
        last,
        b.query_start_loc,
        b.seq_lens,
        b.prefill_len,
        b.drafts,
        cu_num_logits,
        int(cu_num_logits[-1]),
        fresh,
    )
    return input_ids, indices


@case("input_batch._get_num_sampled_and_rejected_kernel")
def sampled_and_rejected_counts(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    num_sampled = (draw.uniform(0, 1, b.num_reqs) * b.num_logits).int() + 1
    return input_batch.get_num_sampled_and_rejected(num_sampled, b.seq_lens, b.cu_num_logits, b.states, b.prefill_len)


@case("input_batch._post_update_kernel")
def update_after_sampling(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    states = b.states.clone()
    states[draw.uniform(0, 1, b.num_reqs) < 0.2] = -1
    counts = draw.ints(0, 3, b.max_num_reqs, 1000) if draw.flag() else None
    last = draw.ints(0, 999, b.max_num_reqs, 1, dtype=torch.int64)
    # Few distinct tokens: one that is sampled twice in a step must be counted twice.
    sampled = draw.ints(0, 3, b.num_reqs, b.max_drafts + 1, dtype=torch.int64)
    num_sampled = draw.ints(0, b.max_drafts + 1, b.num_reqs)
    rejected = draw.ints(0, 2, b.num_reqs)
    query_start_loc = b.query_start_loc if draw.flag() else None
    total_len = draw.ints(1, 50, b.max_num_reqs)
    input_batch.post_update(
        states, b.computed, last, counts, sampled, num_sampled, rejected, query_start_loc, b.tokens, total_len
    )
    return b.computed, last, counts, b.tokens, total_len


@case("input_batch._post_update_num_computed_tokens_kernel")
def update_without_sampling(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    input_batch.post_update_num_computed_tokens(b.states, b.computed, b.query_start_loc)
    return (b.computed,)


@case("input_batch._expand_idx_mapping_kernel")
def expanded_mapping(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    return input_batch.expand_idx_mapping(b.states, int(b.cu_num_logits[-1]), b.cu_num_logits, b.max_drafts + 1)


@case("spec_decode.rejection_sampler._gather_draft_sampled_kernel", "input_batch._expand_idx_mapping_kernel")
def gathered_drafts(draw: Draw) -> tuple[Any, ...]:
    b = Batch(draw)
    rows = int(b.cu_num_logits[-1])
    expanded, local = input_batch.expand_idx_mapping(b.states, rows, b.cu_num_logits, b.max_drafts + 1)
    input_ids = draw.ints(0, 999, b.num_tokens)
    positions = draw.ints(0, 50, b.num_tokens, dtype=torch.int64)
    indices = draw.ints(0, b.num_tokens - 1, rows, dtype=torch.int64)
    return rejection_sampler.gather_draft_sampled(input_ids, positions, indices, expanded, local, b.prefill_len)
