# SPDX-License-Identifier: Apache-2.0
"""Penalties, bad words, logit bias, allowed and stop tokens (vllm/v1/worker/gpu/sample/{penalties,bad_words,logit_bias}.py).

All of them change float32 logits in place. A request's drafts are the input ids of its rows after the first one.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.views import listed, spread

Tensor = torch.Tensor


def penalties(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    token_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    repetition_penalty_ptr: Tensor,
    frequency_penalty_ptr: Tensor,
    presence_penalty_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Repetition (prompt and output), frequency and presence (output) penalties; earlier drafts count as output."""
    states = expanded_idx_mapping_ptr.numpy()
    repetition = repetition_penalty_ptr.numpy()[states]
    frequency = frequency_penalty_ptr.numpy()[states]
    presence = presence_penalty_ptr.numpy()[states]
    rows = np.flatnonzero((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0))
    if not len(rows):
        return
    states, repetition = states[rows], repetition[rows, None]
    counts = output_bin_counts_ptr.numpy()[states, :vocab_size]
    local = expanded_local_pos_ptr.numpy()[rows]
    row, step = listed(local)
    drafts = token_ids_ptr.numpy()[(rows - local)[row] + step + 1]
    inside = (drafts >= 0) & (drafts < vocab_size)
    np.add.at(counts, (row[inside], drafts[inside]), 1)

    packed = np.ascontiguousarray(prompt_bin_mask_ptr.numpy()[states]).view(np.uint8)
    in_prompt = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little").view(np.bool_)
    in_output = counts > 0
    view = logits_ptr.numpy()
    logits = view[rows]
    scale = np.where(in_prompt | in_output, repetition, np.float32(1.0))
    logits *= np.where(logits > 0, np.float32(1.0) / scale, scale)
    logits -= frequency[rows, None] * counts.astype(np.float32)
    logits -= presence[rows, None] * in_output.astype(np.float32)
    view[rows] = logits


def bincount(
    expanded_idx_mapping_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    prefill_len_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Set the bit of every prompt token; count the output tokens that a resumed request brings along."""
    states = expanded_idx_mapping_ptr.numpy()
    prompt_len = prompt_len_ptr.numpy()[states]
    prefill_len = prefill_len_ptr.numpy()[states]
    tokens = all_token_ids_ptr.numpy()
    state = np.repeat(states, prompt_len)
    prompt = tokens[state, spread(np.zeros_like(prompt_len), prompt_len)]
    bits = np.left_shift(np.uint32(1), (prompt % 32).astype(np.uint32))
    np.bitwise_or.at(prompt_bin_mask_ptr.numpy().view(np.uint32), (state, prompt // 32), bits)

    num_output = prefill_len - prompt_len
    state = np.repeat(states, num_output)
    np.add.at(output_bin_counts_ptr.numpy(), (state, tokens[state, spread(prompt_len, num_output)]), 1)


def bad_words(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    bad_word_token_ids_ptr: Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    total_len_ptr: Tensor,
    input_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
) -> None:
    """Mask the last token of a bad word where its other tokens end the row's output (with its earlier drafts)."""
    expanded = expanded_idx_mapping_ptr.numpy()
    rows, word = listed(num_bad_words_ptr.numpy()[expanded])
    states = expanded[rows]
    offsets = bad_word_offsets_ptr.numpy()
    start, end = offsets[states, word], offsets[states, word + 1]
    prompt_len = prompt_len_ptr.numpy()[states]
    output_len = total_len_ptr.numpy()[states] - prompt_len
    local = expanded_local_pos_ptr.numpy()[rows]
    prefix_len = end - start - 1
    effective_len = output_len + local
    match = prefix_len <= effective_len
    words, history, input_ids = bad_word_token_ids_ptr.numpy(), all_token_ids_ptr.numpy(), input_ids_ptr.numpy()
    for i in range(int(prefix_len.max(initial=0))):
        at = np.flatnonzero(match & (i < prefix_len))
        state = states[at]
        position = effective_len[at] - prefix_len[at] + i
        drafted = position - output_len[at]  # from 0 on: among the drafts, which follow the last committed token
        is_draft = drafted >= 0
        committed = history[state, np.where(is_draft, 0, prompt_len[at] + position)]
        draft = input_ids[np.where(is_draft, rows[at] - local[at] + drafted + 1, 0)]
        match[at] = np.where(is_draft, draft, committed) == words[state, start[at] + i]
    logits_ptr.numpy()[rows[match], words[states[match], end[match] - 1]] = -np.inf


def logit_bias(
    logits_ptr: Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: Tensor,
    num_allowed_token_ids_ptr: Tensor,
    allowed_token_ids_ptr: Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: Tensor,
    bias_token_ids_ptr: Tensor,
    bias_token_ids_stride: int,
    bias_ptr: Tensor,
    bias_stride: int,
    pos_ptr: Tensor,
    min_lens_ptr: Tensor,
    num_stop_token_ids_ptr: Tensor,
    restore_when_all_masked_ptr: Tensor,
    stop_token_ids_ptr: Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Keep only allowed tokens, add biases, mask stop tokens before min_tokens are out.

    A row that a grammar and the mask together leave without any token gets its stop tokens back (restore flag).
    """
    logits = logits_ptr.numpy()
    states = expanded_idx_mapping_ptr.numpy()

    row, column = listed(num_allowed_token_ids_ptr.numpy()[states])
    if len(row):
        tokens = allowed_token_ids_ptr.numpy()[states[row], column]
        kept = logits[row, tokens]
        logits[np.unique(row), :vocab_size] = -np.inf
        logits[row, tokens] = kept

    row, column = listed(num_logit_bias_ptr.numpy()[states])
    logits[row, bias_token_ids_ptr.numpy()[states[row], column]] += bias_ptr.numpy()[states[row], column]

    early = pos_ptr.numpy()[: len(states)] + 1 < min_lens_ptr.numpy()[states]
    row, column = listed(np.where(early, num_stop_token_ids_ptr.numpy()[states], 0))
    if not len(row):
        return
    tokens = stop_token_ids_ptr.numpy()[states[row], column]
    kept = logits[row, tokens]
    logits[row, tokens] = -np.inf
    if CHECK_ALL_MASKED_ROWS:
        touched = np.unique(row)
        dead = touched[(logits[touched, :vocab_size] == -np.inf).all(axis=1)]
        restore = np.isin(row, dead) & (restore_when_all_masked_ptr.numpy()[states[row]] != 0) & np.isfinite(kept)
        logits[row[restore], tokens[restore]] = kept[restore]


_SAMPLE = "vllm.v1.worker.gpu.sample."
KERNELS = {
    _SAMPLE + "penalties._penalties_kernel": penalties,
    _SAMPLE + "penalties._bincount_kernel": bincount,
    _SAMPLE + "bad_words._bad_words_kernel": bad_words,
    _SAMPLE + "logit_bias._bias_kernel": logit_bias,
}
