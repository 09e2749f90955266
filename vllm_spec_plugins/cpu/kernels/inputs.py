# SPDX-License-Identifier: Apache-2.0
"""Batch preparation and the update after sampling (vllm/v1/worker/gpu/input_batch.py, buffer_utils.py).

Arguments are the kernels' own, in their order. `idx_mapping` maps a row of the batch to its request state; rows of one
batch have different states. Steps in which every request decodes one token take a shorter way: at batch 1 the number
of NumPy calls is what a step costs beside the model.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.views import at_address, listed, spread, view

Tensor = torch.Tensor


def apply_write(
    output_ptr: Tensor,
    output_stride: Tensor | int,
    write_indices_ptr: Tensor,
    write_starts_ptr: Tensor,
    write_contents_ptr: Tensor,
    write_cu_lens_ptr: Tensor,
    write_group_ids_ptr: Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Copy content[cu_lens[i-1]:cu_lens[i]] to row indices[i] from column starts[i], for each staged write i in order."""
    contents = view(write_contents_ptr)
    writes = zip(write_indices_ptr.tolist(), write_starts_ptr.tolist(), write_cu_lens_ptr.tolist(), strict=True)
    begin = 0
    if MULTI_GROUP:
        assert isinstance(output_stride, Tensor) and write_group_ids_ptr is not None
        addresses, strides, groups = output_ptr.tolist(), output_stride.tolist(), write_group_ids_ptr.tolist()
        for group, (row, start, end) in zip(groups, writes, strict=True):
            stride = strides[group]
            at_address(addresses[group] + 4 * row * stride, 1, stride)[0, start : start + end - begin] = contents[
                begin:end
            ]
            begin = end
    else:
        flat = view(output_ptr).reshape(-1)
        for row, start, end in writes:
            offset = row * output_stride + start
            flat[offset : offset + end - begin] = contents[begin:end]
            begin = end


def prepare_prefill_inputs(
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Input ids of rows that still prefill, and the prefill tokens that come after them (0 beyond the prompt)."""
    states = view(idx_mapping_ptr)
    prefill_lens = view(prefill_lens_ptr)[states]
    computed = view(num_computed_tokens_ptr)[states]
    rows = np.flatnonzero(computed < prefill_lens)
    if not len(rows):
        return
    states, prefill_lens, computed = states[rows], prefill_lens[rows], computed[rows]
    query_start_loc = view(query_start_loc_ptr)
    starts = query_start_loc[rows]
    lengths = query_start_loc[rows + 1] - starts
    tokens = view(all_token_ids_ptr)
    view(input_ids_ptr)[spread(starts, lengths)] = tokens[np.repeat(states, lengths), spread(computed, lengths)]

    position = computed + lengths + np.arange(num_lookahead)[:, None]
    inside = position < prefill_lens
    ahead = tokens[states, np.where(inside, position, 0)]
    view(next_prefill_tokens_ptr)[:num_lookahead, states] = np.where(inside, ahead, 0)


def prepare_pos_seq_lens(
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """positions = computed + 0..query_len-1 and seq_lens = computed + query_len per row; seq_lens 0 beyond the batch."""
    states = view(idx_mapping_ptr)
    num_reqs = len(states)
    computed = view(num_computed_tokens_ptr)[states]
    query_start_loc, seq_lens = view(query_start_loc_ptr), view(seq_lens_ptr)
    begin, end = int(query_start_loc[0]), int(query_start_loc[num_reqs])
    if end - begin == num_reqs:
        view(pos_ptr)[begin:end] = computed
        seq_lens[:num_reqs] = computed + 1
    else:
        starts = query_start_loc[:num_reqs]
        lengths = query_start_loc[1 : num_reqs + 1] - starts
        seq_lens[:num_reqs] = computed + lengths
        view(pos_ptr)[begin:end] = np.repeat(computed - starts, lengths) + np.arange(begin, end)
    seq_lens[num_reqs:max_num_reqs] = 0


def combine_sampled_and_draft_tokens(
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Indices of the rows that need logits; the last sampled token and the drafts as input ids of decoding rows."""
    states = view(idx_mapping_ptr)
    num_reqs = len(states)
    cu_num_logits, query_end = view(cu_num_logits_ptr), view(query_start_loc_ptr)[1 : num_reqs + 1]
    seq_lens, prefill_lens = view(seq_lens_ptr)[:num_reqs], view(prefill_len_ptr)[states]
    decoding = seq_lens > prefill_lens
    input_ids, last_sampled = view(input_ids_ptr), view(last_sampled_tokens_ptr).reshape(-1)
    first, last = int(cu_num_logits[0]), int(cu_num_logits[num_reqs])
    if NUM_NEW_SAMPLED_TOKENS == 1 and last - first == num_reqs:
        rows = query_end - 1
        view(logits_indices_ptr)[first:last] = rows
        if np.count_nonzero(decoding) < num_reqs:
            rows, states = rows[decoding], states[decoding]
        input_ids[rows] = last_sampled[states]
        return

    num_logits = cu_num_logits[1 : num_reqs + 1] - cu_num_logits[:num_reqs]
    logits_start = query_end - num_logits
    view(logits_indices_ptr)[first:last] = spread(logits_start, num_logits)
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # Prompt-tail slots stay intact: only slots of generated tokens are rewritten.
        rewrite = decoding & (seq_lens - num_logits >= prefill_lens)
        input_ids[logits_start[rewrite]] = last_sampled[states[rewrite]]
    num_drafts = np.where(decoding, num_logits - NUM_NEW_SAMPLED_TOKENS, 0)
    row, column = listed(num_drafts)
    if len(row):
        input_ids[(query_end - num_drafts)[row] + column] = view(draft_tokens_ptr)[states[row], column]


def get_num_sampled_and_rejected(
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    seq_lens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    prefill_len_ptr: Tensor,
) -> None:
    """rejected = logits - sampled; both 0 for rows whose prefill is not finished. Writes num_sampled in place."""
    states = view(idx_mapping_ptr)
    num_reqs = len(states)
    finished = view(seq_lens_ptr)[:num_reqs] >= view(prefill_len_ptr)[states]
    num_sampled, num_rejected = view(num_sampled_ptr)[:num_reqs], view(num_rejected_ptr)[:num_reqs]
    cu_num_logits = view(cu_num_logits_ptr)
    num_rejected[:] = cu_num_logits[1 : num_reqs + 1] - cu_num_logits[:num_reqs] - num_sampled
    if np.count_nonzero(finished) < num_reqs:
        num_sampled *= finished
        num_rejected *= finished


def post_update(
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    num_warps: int = 1,
) -> None:
    """Append each row's sampled tokens to its request, count them, and advance num_computed_tokens by what was kept."""
    states, num_sampled, tokens = view(idx_mapping_ptr), view(num_sampled_ptr), view(sampled_tokens_ptr)
    kept = -view(num_rejected_ptr)
    if query_start_loc_ptr is not None:
        query_start_loc = view(query_start_loc_ptr)
        kept += query_start_loc[1 : len(states) + 1] - query_start_loc[: len(states)]
    if np.count_nonzero(states < 0):
        rows = np.flatnonzero(states >= 0)
        states, num_sampled, tokens, kept = states[rows], num_sampled[rows], tokens[rows], kept[rows]
    total_len, all_token_ids = view(total_len_ptr), view(all_token_ids_ptr)
    last_sampled = view(last_sampled_tokens_ptr).reshape(-1)
    before = total_len[states]
    if tokens.shape[1] == 1 and np.count_nonzero(num_sampled) == len(num_sampled):
        sampled = tokens[:, 0]
        all_token_ids[states, before] = last_sampled[states] = sampled
        if output_bin_counts_ptr is not None:
            view(output_bin_counts_ptr)[states, sampled] += 1
    else:
        row, column = listed(num_sampled)
        state, sampled = states[row], tokens[row, column]
        all_token_ids[state, before[row] + column] = sampled
        if output_bin_counts_ptr is not None:
            np.add.at(view(output_bin_counts_ptr), (state, sampled), 1)
        some = np.flatnonzero(num_sampled)
        last_sampled[states[some]] = tokens[some, num_sampled[some] - 1]
    total_len[states] = before + num_sampled
    view(num_computed_tokens_ptr)[states] += kept


def post_update_num_computed_tokens(
    idx_mapping_ptr: Tensor, num_computed_tokens_ptr: Tensor, query_start_loc_ptr: Tensor
) -> None:
    """num_computed_tokens += query_len per row (steps that sample nothing)."""
    states = view(idx_mapping_ptr)
    query_start_loc = view(query_start_loc_ptr)[: len(states) + 1]
    view(num_computed_tokens_ptr)[states] += query_start_loc[1:] - query_start_loc[:-1]


def expand_idx_mapping(
    idx_mapping_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Request state and position within its request of every logits row."""
    states = view(idx_mapping_ptr)
    cu_num_logits = view(cu_num_logits_ptr)[: len(states) + 1]
    begin, end = int(cu_num_logits[0]), int(cu_num_logits[-1])
    num_logits = cu_num_logits[1:] - cu_num_logits[:-1]
    view(expanded_idx_mapping_ptr)[begin:end] = np.repeat(states, num_logits)
    view(expanded_local_pos_ptr)[begin:end] = np.arange(begin, end) - np.repeat(cu_num_logits[:-1], num_logits)


_INPUT_BATCH = "vllm.v1.worker.gpu.input_batch."
KERNELS = {
    "vllm.v1.worker.gpu.buffer_utils._apply_write_kernel": apply_write,
    _INPUT_BATCH + "_prepare_prefill_inputs_kernel": prepare_prefill_inputs,
    _INPUT_BATCH + "_prepare_pos_seq_lens_kernel": prepare_pos_seq_lens,
    _INPUT_BATCH + "_combine_sampled_and_draft_tokens_kernel": combine_sampled_and_draft_tokens,
    _INPUT_BATCH + "_get_num_sampled_and_rejected_kernel": get_num_sampled_and_rejected,
    _INPUT_BATCH + "_post_update_kernel": post_update,
    _INPUT_BATCH + "_post_update_num_computed_tokens_kernel": post_update_num_computed_tokens,
    _INPUT_BATCH + "_expand_idx_mapping_kernel": expand_idx_mapping,
}
