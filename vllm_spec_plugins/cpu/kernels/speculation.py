# SPDX-License-Identifier: Apache-2.0
"""Gathering drafts for verification (vllm/v1/worker/gpu/spec_decode/rejection_sampler.py)."""

from __future__ import annotations

import numpy as np
import torch

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
    sampled, num_sampled = sampled_ptr.numpy(), num_sampled_ptr.numpy()
    row, column = np.nonzero(np.arange(sampled.shape[1]) < num_sampled[:, None])
    flat_sampled_ptr.numpy()[cu_num_logits_ptr.numpy()[row] + column] = sampled[row, column]


_REJECTION = "vllm.v1.worker.gpu.spec_decode.rejection_sampler."
KERNELS = {
    _REJECTION + "_gather_draft_sampled_kernel": gather_draft_sampled,
    _REJECTION + "_flatten_sampled_kernel": flatten_sampled,
}
