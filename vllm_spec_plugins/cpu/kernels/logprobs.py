# SPDX-License-Identifier: Apache-2.0
"""Logprobs, ranks, prompt logprobs, sampling masks (vllm/v1/worker/gpu/sample/{logprob,prompt_logprob,output}.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.views import float_rows, listed, spread

Tensor = torch.Tensor


def topk_log_softmax(
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    topk_ids_ptr: Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Log-softmax over the vocabulary, evaluated at the given token ids."""
    logits = float_rows(logits_ptr)[:, :vocab_size]
    largest = logits.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(logits, topk_ids_ptr.numpy()[:, :topk], axis=1)
    output_ptr.numpy()[...] = chosen - largest - normalizer


def ranks(
    output_ptr: Tensor, logits_ptr: Tensor, logits_stride: int, token_ids_ptr: Tensor, vocab_size: int, BLOCK_SIZE: int
) -> None:
    """1-based rank of each row's token: the number of logits that are at least as large."""
    logits = float_rows(logits_ptr)[:, :vocab_size]
    chosen = np.take_along_axis(logits, token_ids_ptr.numpy().reshape(-1, 1).astype(np.int64), axis=1)
    np.sum(logits >= chosen, axis=1, out=output_ptr.numpy())


def fill_logprob_token_ids(
    out_token_ids_ptr: Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: Tensor,
    topk_indices_ptr: Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    num_per_req_token_ids_ptr: Tensor,
    per_req_token_ids_ptr: Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """Column 0: the sampled token; then the request's own token ids where it named some, else the top-k ones."""
    states = expanded_idx_mapping_ptr.numpy()
    token_ids, valid = out_token_ids_ptr.numpy(), out_valid_mask_ptr.numpy()
    token_ids[:, 0] = sampled_token_ids_ptr.numpy()
    valid[:, 0] = True
    num_custom = num_per_req_token_ids_ptr.numpy()[states]
    row, column = listed(num_custom)
    token_ids[row, 1 + column] = per_req_token_ids_ptr.numpy()[states[row], column]
    valid[row, 1 + column] = True
    if NUM_TOPK > 0:
        others = np.flatnonzero(num_custom <= 0)
        token_ids[others, 1 : 1 + NUM_TOPK] = topk_indices_ptr.numpy()[others, :NUM_TOPK]
        valid[others, 1 : 1 + NUM_TOPK] = True


def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """For every token of the batch the token that follows it: the one whose logprob its logits give."""
    states = idx_mapping_ptr.numpy()
    query_start_loc = query_start_loc_ptr.numpy()[: len(states) + 1]
    lengths = query_start_loc[1:] - query_start_loc[:-1]
    following = spread(num_computed_tokens_ptr.numpy()[states] + 1, lengths)
    tokens = all_token_ids_ptr.numpy()
    # Behind a full row there is no next token; what stands there is not used.
    following = np.minimum(following, tokens.shape[1] - 1)
    begin, end = int(query_start_loc[0]), int(query_start_loc[-1])
    prompt_logprobs_token_ids_ptr.numpy()[begin:end] = tokens[np.repeat(states, lengths), following]


def num_nans(logits_ptr: Tensor, logits_stride: int, num_nans_ptr: Tensor, vocab_size: int, BLOCK_SIZE: int) -> None:
    """Number of NaNs per row of logits."""
    np.sum(np.isnan(float_rows(logits_ptr)[:, :vocab_size]), axis=1, out=num_nans_ptr.numpy())


def compact_sampling_mask(
    logits_ptr: Tensor,
    logits_row_stride: int,
    logits_col_stride: int,
    cu_num_logits_ptr: Tensor,
    num_sampled_tokens_ptr: Tensor,
    token_ids_ptr: Tensor,
    token_ids_row_stride: int,
    packed_mask_ptr: Tensor,
    packed_mask_row_stride: int,
    counts_ptr: Tensor,
    vocab_size: int,
    max_num_kept: int,
    ROWS_PER_REQUEST: int,
    BLOCK_SIZE: int,
) -> None:
    """Per sampled token the tokens that could have been sampled: the first ids, their number, a bit mask."""
    num_sampled = num_sampled_tokens_ptr.numpy()
    counts = counts_ptr.numpy()
    counts[:] = 0
    request, slot = listed(np.minimum(num_sampled, ROWS_PER_REQUEST))
    output = request * ROWS_PER_REQUEST + slot
    kept = np.isfinite(float_rows(logits_ptr)[cu_num_logits_ptr.numpy()[request] + slot, :vocab_size])
    row, token = np.nonzero(kept)
    total = kept.sum(axis=1)
    counts[output] = total
    place = np.arange(len(row)) - np.repeat(np.cumsum(total) - total, total)
    first = place < max_num_kept
    token_ids_ptr.numpy()[output[row[first]], place[first]] = token[first]
    packed_mask_ptr.numpy()[output] = np.packbits(kept, axis=1, bitorder="little")


def trace_replay(
    sampled_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    trace_token_ids_ptr: Tensor,
    trace_token_ids_stride: int,
    trace_len_ptr: Tensor,
    total_len_ptr: Tensor,
    prompt_len_ptr: Tensor,
) -> None:
    """Overwrite the sampled token with the request's trace while it lasts."""
    states = idx_mapping_ptr.numpy()
    known = np.where(states >= 0, states, 0)
    step = total_len_ptr.numpy()[known] - prompt_len_ptr.numpy()[known]
    rows = np.flatnonzero((states >= 0) & (step >= 0) & (step < trace_len_ptr.numpy()[known]))
    sampled_ptr.numpy()[rows] = trace_token_ids_ptr.numpy()[states[rows], step[rows]]


_SAMPLE = "vllm.v1.worker.gpu.sample."
KERNELS = {
    _SAMPLE + "logprob._topk_log_softmax_kernel": topk_log_softmax,
    _SAMPLE + "logprob._ranks_kernel": ranks,
    _SAMPLE + "logprob._fill_logprob_token_ids_kernel": fill_logprob_token_ids,
    _SAMPLE + "prompt_logprob._prompt_logprobs_token_ids_kernel": prompt_logprobs_token_ids,
    _SAMPLE + "output._compact_sampling_mask_kernel": compact_sampling_mask,
    _SAMPLE + "trace_replay._trace_replay_kernel": trace_replay,
    "vllm.v1.worker.gpu.metrics.logits._num_nans_kernel": num_nans,
}
