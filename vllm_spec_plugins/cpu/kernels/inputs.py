# SPDX-License-Identifier: Apache-2.0
"""Batch preparation and the update after sampling (vllm/v1/worker/gpu/input_batch.py, buffer_utils.py).

Arguments are the kernels' own, in their order. `idx_mapping` maps a row of the batch to its request state; rows of one
batch have different states.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.views import at_address, spread

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
    contents = write_contents_ptr.numpy()
    writes = zip(write_indices_ptr.tolist(), write_starts_ptr.tolist(), write_cu_lens_ptr.tolist(), strict=True)
    begin = 0
    if MULTI_GROUP:
        assert isinstance(output_stride, Tensor) and write_group_ids_ptr is not None
        addresses, strides, groups = output_ptr.tolist(), output_stride.tolist(), write_group_ids_ptr.tolist()
        for group, (row, start, end) in zip(groups, writes, strict=True):
            stride = strides[group]
            at_address(addresses[group] + 4 * row * stride, 1, stride)[0, start : start + end - begin] = contents[begin:end]
            begin = end
    else:
        flat = output_ptr.numpy().reshape(-1)
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
    states = idx_mapping_ptr.numpy()
    prefill_lens = prefill_lens_ptr.numpy()[states]
    computed = num_computed_tokens_ptr.numpy()[states]
    rows = np.flatnonzero(computed < prefill_lens)
    if not len(rows):
        return
    states, prefill_lens, computed = states[rows], prefill_lens[rows], computed[rows]
    query_start_loc = query_start_loc_ptr.numpy()
    starts = query_start_loc[rows]
    lengths = query_start_loc[rows + 1] - starts
    tokens = all_token_ids_ptr.numpy()
    input_ids_ptr.numpy()[spread(starts, lengths)] = tokens[np.repeat(states, lengths), spread(computed, lengths)]

    position = computed + lengths + np.arange(num_lookahead)[:, None]
    inside = position < prefill_lens
    ahead = tokens[states, np.where(inside, position, 0)]
    next_prefill_tokens_ptr.numpy()[:num_lookahead, states] = np.where(inside, ahead, 0)


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
    states = idx_mapping_ptr.numpy()
    num_reqs = len(states)
    computed = num_computed_tokens_ptr.numpy()[states]
    query_start_loc = query_start_loc_ptr.numpy()[: num_reqs + 1]
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts
    seq_lens = seq_lens_ptr.numpy()
    np.add(computed, lengths, out=seq_lens[:num_reqs])
    seq_lens[num_reqs:max_num_reqs] = 0
    begin, end = int(query_start_loc[0]), int(query_start_loc[-1])
    pos_ptr.numpy()[begin:end] = np.repeat(computed - starts, lengths) + np.arange(begin, end)


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
    states = idx_mapping_ptr.numpy()
    num_reqs = len(states)
    cu_num_logits = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_logits = cu_num_logits[1:] - cu_num_logits[:-1]
    query_end = query_start_loc_ptr.numpy()[1 : num_reqs + 1]
    logits_start = query_end - num_logits
    logits_indices_ptr.numpy()[cu_num_logits[0] : cu_num_logits[-1]] = spread(logits_start, num_logits)

    seq_lens = seq_lens_ptr.numpy()[:num_reqs]
    prefill_lens = prefill_len_ptr.numpy()[states]
    decoding = seq_lens > prefill_lens
    input_ids = input_ids_ptr.numpy()
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # Prompt-tail slots stay intact: only slots of generated tokens are rewritten.
        rewrite = decoding & (seq_lens - num_logits >= prefill_lens)
        input_ids[logits_start[rewrite]] = last_sampled_tokens_ptr.numpy().reshape(-1)[states[rewrite]]

    num_drafts = np.where(decoding, num_logits - NUM_NEW_SAMPLED_TOKENS, 0)
    most = int(num_drafts.max(initial=0))
    if most > 0:
        column = np.arange(most)
        row, column = np.nonzero(column < num_drafts[:, None])
        input_ids[(query_end - num_drafts)[row] + column] = draft_tokens_ptr.numpy()[states[row], column]


def get_num_sampled_and_rejected(
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    seq_lens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    prefill_len_ptr: Tensor,
) -> None:
    """rejected = logits - sampled; both 0 for rows whose prefill is not finished. Writes num_sampled in place."""
    states = idx_mapping_ptr.numpy()
    num_reqs = len(states)
    finished = seq_lens_ptr.numpy()[:num_reqs] >= prefill_len_ptr.numpy()[states]
    num_sampled = num_sampled_ptr.numpy()[:num_reqs]
    num_sampled *= finished
    cu_num_logits = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_rejected = num_rejected_ptr.numpy()[:num_reqs]
    np.subtract(cu_num_logits[1:] - cu_num_logits[:-1], num_sampled, out=num_rejected, casting="same_kind")
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
    states = idx_mapping_ptr.numpy()
    rows = np.flatnonzero(states >= 0)
    states = states[rows]
    num_sampled = num_sampled_ptr.numpy()[rows]
    total_len = total_len_ptr.numpy()
    tokens = sampled_tokens_ptr.numpy()
    row, column = np.nonzero(np.arange(tokens.shape[1]) < num_sampled[:, None])
    state = states[row]
    sampled = tokens[rows[row], column]
    all_token_ids_ptr.numpy()[state, total_len[state] + column] = sampled
    if output_bin_counts_ptr is not None:
        np.add.at(output_bin_counts_ptr.numpy(), (state, sampled), 1)

    some = np.flatnonzero(num_sampled > 0)
    last_sampled_tokens_ptr.numpy().reshape(-1)[states[some]] = tokens[rows[some], num_sampled[some] - 1]
    total_len[states] += num_sampled

    kept = -num_rejected_ptr.numpy()[rows]
    if query_start_loc_ptr is not None:
        query_start_loc = query_start_loc_ptr.numpy()
        kept += query_start_loc[rows + 1] - query_start_loc[rows]
    num_computed_tokens_ptr.numpy()[states] += kept


def post_update_num_computed_tokens(
    idx_mapping_ptr: Tensor, num_computed_tokens_ptr: Tensor, query_start_loc_ptr: Tensor
) -> None:
    """num_computed_tokens += query_len per row (steps that sample nothing)."""
    states = idx_mapping_ptr.numpy()
    query_start_loc = query_start_loc_ptr.numpy()[: len(states) + 1]
    num_computed_tokens_ptr.numpy()[states] += query_start_loc[1:] - query_start_loc[:-1]


def expand_idx_mapping(
    idx_mapping_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Request state and position within its request of every logits row."""
    states = idx_mapping_ptr.numpy()
    cu_num_logits = cu_num_logits_ptr.numpy()[: len(states) + 1]
    begin, end = int(cu_num_logits[0]), int(cu_num_logits[-1])
    num_logits = cu_num_logits[1:] - cu_num_logits[:-1]
    expanded_idx_mapping_ptr.numpy()[begin:end] = np.repeat(states, num_logits)
    expanded_local_pos_ptr.numpy()[begin:end] = np.arange(begin, end) - np.repeat(cu_num_logits[:-1], num_logits)


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
