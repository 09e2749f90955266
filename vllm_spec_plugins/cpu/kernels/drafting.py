# SPDX-License-Identifier: Apache-2.0
"""Inputs of vLLM's draft models (vllm/v1/worker/gpu/spec_decode/{standalone_ar,target_dependent_ar}/speculator.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.launch import needs_grid
from vllm_spec_plugins.cpu.kernels.views import spread

Tensor = torch.Tensor


@needs_grid
def prepare_standalone_prefill(
    grid: tuple[int, ...],
    target_input_ids_ptr: Tensor,
    target_positions_ptr: Tensor,
    last_sampled_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    out_input_ids_ptr: Tensor,
    out_positions_ptr: Tensor,
    last_token_indices_ptr: Tensor,
    out_query_start_loc_ptr: Tensor,
    out_seq_lens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    num_rejected_ptr: Tensor,
    max_num_reqs: int,
    max_model_len: int,
    BLOCK_SIZE: int,
) -> None:
    """A draft model with its own K/V: each request's accepted tokens, then the sampled one, then idle rejected slots."""
    num_reqs = grid[0]
    query_start_loc = query_start_loc_ptr.numpy()[: num_reqs + 1]
    starts, lengths = query_start_loc[:-1], query_start_loc[1:] - query_start_loc[:-1]
    valid = lengths - num_rejected_ptr.numpy()[:num_reqs]
    out_starts = starts + np.arange(num_reqs)
    total = lengths + 1
    column = spread(np.zeros_like(total), total)
    out = np.repeat(out_starts, total) + column

    copied = column < np.repeat(valid, total)
    source = np.where(copied, np.repeat(starts, total) + column, 0)
    tokens = np.where(copied, target_input_ids_ptr.numpy()[source], 0)
    input_ids = out_input_ids_ptr.numpy()
    input_ids[out] = tokens
    input_ids[out_starts + valid] = last_sampled_ptr.numpy().reshape(-1)[idx_mapping_ptr.numpy()[:num_reqs]]
    first = target_positions_ptr.numpy()[starts]
    out_positions_ptr.numpy()[out] = np.minimum(np.repeat(first, total) + column, max_model_len - 1)

    last_token_indices = last_token_indices_ptr.numpy()
    last_token_indices[:num_reqs] = out_starts + valid
    last_token_indices[num_reqs:max_num_reqs] = 0
    out_query_start_loc = out_query_start_loc_ptr.numpy()
    out_query_start_loc[:num_reqs] = out_starts
    out_query_start_loc[num_reqs : max_num_reqs + 1] = query_start_loc[-1] + num_reqs
    out_seq_lens = out_seq_lens_ptr.numpy()
    out_seq_lens[:num_reqs] = np.minimum(seq_lens_ptr.numpy()[:num_reqs] + 1, max_model_len)
    out_seq_lens[num_reqs:max_num_reqs] = 0


@needs_grid
def prepare_dependent_prefill(
    grid: tuple[int, ...],
    last_token_indices_ptr: Tensor,
    draft_current_step_ptr: Tensor,
    draft_input_ids_ptr: Tensor,
    draft_positions_ptr: Tensor,
    draft_query_start_loc_ptr: Tensor,
    draft_seq_lens_ptr: Tensor,
    target_input_ids_ptr: Tensor,
    target_positions_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """A drafter on the target's hidden states: input ids shifted left by one, the next token (or prompt token) behind."""
    num_reqs = grid[0]
    states = idx_mapping_ptr.numpy()[:num_reqs]
    query_start_loc = query_start_loc_ptr.numpy()[: num_reqs + 1]
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts - num_rejected_ptr.numpy()[:num_reqs]
    sampled = num_sampled_ptr.numpy()[:num_reqs] > 0
    last_sampled, following = last_sampled_ptr.numpy().reshape(-1), next_prefill_tokens_ptr.numpy().reshape(-1)

    kept = spread(starts, lengths)
    shifted = spread(starts + 1, np.maximum(lengths - 1, 0))
    input_ids = draft_input_ids_ptr.numpy()
    input_ids[shifted - 1] = target_input_ids_ptr.numpy()[shifted]
    last = starts + lengths - 1
    input_ids[last] = np.where(sampled, last_sampled[states], following[states])
    draft_positions_ptr.numpy()[kept] = target_positions_ptr.numpy()[kept]

    last_token_indices = last_token_indices_ptr.numpy()
    last_token_indices[:num_reqs] = last
    last_token_indices[num_reqs:max_num_reqs] = 0
    draft_current_step_ptr.zero_()
    draft_query_start_loc = draft_query_start_loc_ptr.numpy()
    draft_query_start_loc[:num_reqs] = starts
    draft_query_start_loc[num_reqs : max_num_reqs + 1] = query_start_loc[-1]
    draft_seq_lens = draft_seq_lens_ptr.numpy()
    draft_seq_lens[:num_reqs] = seq_lens_ptr.numpy()[:num_reqs]
    draft_seq_lens[num_reqs:max_num_reqs] = 0


@needs_grid
def prepare_decode_inputs(
    grid: tuple[int, ...],
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    target_seq_lens_ptr: Tensor,
    num_rejected_ptr: Tensor,
    input_ids_ptr: Tensor,
    positions_ptr: Tensor,
    sample_src_positions_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    max_model_len: int,
    max_num_reqs: int,
    BLOCK_SIZE: int,
    ADVANCE_DRAFT_POSITIONS: bool,
) -> None:
    """The first draft tokens as the inputs of the second drafting step, one row per request."""
    num_reqs = grid[0] - 1
    query_start_loc_ptr.numpy()[: max_num_reqs + 1] = np.minimum(np.arange(max_num_reqs + 1), num_reqs)
    drafts = draft_tokens_ptr.numpy()
    input_ids_ptr.numpy()[:num_reqs] = drafts[:num_reqs] if drafts.ndim == 1 else drafts[:num_reqs, 0]
    sample_src_positions_ptr.numpy()[:num_reqs] += 1
    lengths = target_seq_lens_ptr.numpy()[:num_reqs] - num_rejected_ptr.numpy()[:num_reqs]
    if ADVANCE_DRAFT_POSITIONS:
        positions = positions_ptr.numpy()[:num_reqs]
        np.minimum(positions + 1, max_model_len - 1, out=positions)
        lengths = np.minimum(lengths + 1, max_model_len)
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = lengths
    seq_lens[num_reqs:max_num_reqs] = 0


@needs_grid
def update_draft_inputs(
    grid: tuple[int, ...],
    output_draft_tokens_ptr: Tensor,
    output_draft_tokens_stride: int,
    next_input_hidden_states_ptr: Tensor,
    next_input_hidden_states_stride: int,
    input_ids_ptr: Tensor,
    positions_ptr: Tensor,
    sample_src_positions_ptr: Tensor,
    seq_lens_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    current_draft_step_ptr: Tensor,
    hidden_states_ptr: Tensor,
    hidden_states_stride: int,
    hidden_size: int,
    max_model_len: int,
    num_speculative_steps: int,
    BLOCK_SIZE: int,
    ADVANCE_DRAFT_POSITIONS: bool,
) -> None:
    """Keep the drafted tokens; unless it was the last step, make them (and the hidden states) the next step's inputs."""
    num_reqs = grid[0]
    drafts = draft_tokens_ptr.numpy()[:num_reqs]
    step = int(current_draft_step_ptr)
    output_draft_tokens_ptr.numpy()[:num_reqs, step] = drafts
    if step >= num_speculative_steps - 1:
        return
    sample_src_positions_ptr.numpy()[:num_reqs] += 1
    input_ids_ptr.numpy()[:num_reqs] = drafts
    # Through torch: hidden states have the model's dtype.
    next_input_hidden_states_ptr[:num_reqs, :hidden_size] = hidden_states_ptr[:num_reqs, :hidden_size]
    if ADVANCE_DRAFT_POSITIONS:
        positions, seq_lens = positions_ptr.numpy()[:num_reqs], seq_lens_ptr.numpy()[:num_reqs]
        np.minimum(positions + 1, max_model_len - 1, out=positions)
        np.minimum(seq_lens + 1, max_model_len, out=seq_lens)


_DECODE = "vllm.v1.worker.gpu.spec_decode."
KERNELS = {
    _DECODE + "standalone_ar.speculator._prepare_prefill_inputs_kernel": prepare_standalone_prefill,
    _DECODE + "target_dependent_ar.speculator._prepare_prefill_inputs_kernel": prepare_dependent_prefill,
    _DECODE + "target_dependent_ar.speculator._prepare_decode_inputs_kernel": prepare_decode_inputs,
    _DECODE + "target_dependent_ar.speculator._update_draft_inputs_kernel": update_draft_inputs,
}
