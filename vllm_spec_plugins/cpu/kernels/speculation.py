# SPDX-License-Identifier: Apache-2.0
"""Drafts: gathering them, and vLLM's n-gram lookup (vllm/v1/worker/gpu/spec_decode/{rejection_sampler,ngram}.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.launch import needs_grid
from vllm_spec_plugins.cpu.kernels.views import listed

Tensor = torch.Tensor


def gather_draft_sampled(
    draft_sampled_ptr: Tensor,
    pos_ptr: Tensor,
    input_ids_ptr: Tensor,
    positions_ptr: Tensor,
    logits_indices_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    prefill_len_ptr: Tensor,
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    """Input token and position of each logits row; -1 for draft slots of steps that start within the prefill."""
    token = logits_indices_ptr.numpy()[:num_logits]
    positions = positions_ptr.numpy()[token]
    local = expanded_local_pos_ptr.numpy()[:num_logits]
    prefill_len = prefill_len_ptr.numpy()[expanded_idx_mapping_ptr.numpy()[:num_logits]]
    placeholder = (local > 0) & (positions - local < prefill_len)
    draft_sampled_ptr.numpy()[:num_logits] = np.where(placeholder, -1, input_ids_ptr.numpy()[token])
    pos_ptr.numpy()[:num_logits] = positions


def flatten_sampled(
    flat_sampled_ptr: Tensor,
    sampled_ptr: Tensor,
    sampled_stride: int,
    num_sampled_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    num_warps: int = 1,
) -> None:
    """sampled[r, :num_sampled[r]] at flat position cu_num_logits[r]."""
    row, column = listed(num_sampled_ptr.numpy())
    flat_sampled_ptr.numpy()[cu_num_logits_ptr.numpy()[row] + column] = sampled_ptr.numpy()[row, column]


@needs_grid
def ngram_scan(
    grid: tuple[int, ...],
    token_ids_ptr: Tensor,
    token_ids_stride: int,
    idx_mapping_ptr: Tensor,
    total_len_ptr: Tensor,
    num_sampled_ptr: Tensor,
    scratch_ptr: Tensor,
    scratch_stride: int,
    L: int,
    MIN_N: int,
    MAX_N: int,
    MAX_N_PO2: int,
    BLOCK_L: int,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Per block of positions the best earlier occurrence of the request's suffix: n * (L + 1) + position + 1, or 0."""
    num_reqs, num_blocks = grid
    scratch = scratch_ptr.numpy()[:num_reqs, :num_blocks]
    scratch[:] = 0
    states = idx_mapping_ptr.numpy()[:num_reqs]
    tokens, lengths = token_ids_ptr.numpy(), total_len_ptr.numpy()
    for row in np.flatnonzero((num_sampled_ptr.numpy()[:num_reqs] > 0) & (lengths[states] >= MIN_N)):
        length = int(lengths[states[row]])
        text = tokens[states[row], :length]
        score = np.zeros(num_blocks * BLOCK_L, dtype=np.int64)
        for n in range(MIN_N, min(MAX_N, length - 1) + 1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
            position = np.flatnonzero((windows == text[length - n :]).all(axis=1))
            score[position] = n * (L + 1) + position + 1
        scratch[row] = score.reshape(num_blocks, BLOCK_L).max(axis=1)


def ngram_finalize(
    token_ids_ptr: Tensor,
    token_ids_stride: int,
    idx_mapping_ptr: Tensor,
    total_len_ptr: Tensor,
    num_sampled_ptr: Tensor,
    last_sampled_ptr: Tensor,
    scratch_ptr: Tensor,
    scratch_stride: int,
    drafts_ptr: Tensor,
    L: int,
    N_BLOCKS: int,
    K: int,
    K_PO2: int,
    N_BLOCKS_PO2: int,
    num_warps: int = 2,
    num_stages: int = 1,
) -> None:
    """The K tokens that followed the best match (longest, then latest); the last sampled token where there are none."""
    states = idx_mapping_ptr.numpy()
    score = scratch_ptr.numpy()[: len(states), :N_BLOCKS].max(axis=1)
    matched, position = np.divmod(score - 1, L + 1)
    start = np.where(score > 0, position + matched, 0)
    available = np.where(
        (score > 0) & (num_sampled_ptr.numpy()[: len(states)] > 0), total_len_ptr.numpy()[states] - start, 0
    )
    column = np.arange(K)
    following = token_ids_ptr.numpy()[states[:, None], np.minimum(start[:, None] + column, L - 1)]
    last = last_sampled_ptr.numpy()[states]
    drafts_ptr.numpy()[: len(states), :K] = np.where(column < available[:, None], following, last[:, None])


_REJECTION = "vllm.v1.worker.gpu.spec_decode.rejection_sampler."
KERNELS = {
    _REJECTION + "_gather_draft_sampled_kernel": gather_draft_sampled,
    _REJECTION + "_flatten_sampled_kernel": flatten_sampled,
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator._ngram_scan_kernel": ngram_scan,
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator._ngram_finalize_kernel": ngram_finalize,
}
