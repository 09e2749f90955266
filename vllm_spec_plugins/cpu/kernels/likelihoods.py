# SPDX-License-Identifier: Apache-2.0
"""Probabilities that vLLM's rejection sampler compares (vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py).

Shapes: N logits rows, R requests, B blocks of the vocabulary. Normalizers are kept per block, as a maximum and a sum of
exponentials. Draft logits are kept before the temperature is applied.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.views import Array, block_argmax, float_rows

Tensor = torch.Tensor


def _blocks(logits: Array, size: int) -> list[Array]:
    return [logits[:, begin : begin + size] for begin in range(0, logits.shape[1], size)]


def _max_and_sumexp(logits: Array, size: int) -> tuple[Array, Array]:
    """float32[n, B] each: per block the maximum and the sum of exponentials below it (0 for a block of -inf)."""
    maxima, sums = [], []
    for part in _blocks(logits, size):
        largest = part.max(axis=1)
        with np.errstate(invalid="ignore"):
            total = np.exp(part - largest[:, None]).sum(axis=1)
        maxima.append(largest)
        sums.append(np.where(largest > -np.inf, total, np.float32(0.0)))
    return np.stack(maxima, axis=1), np.stack(sums, axis=1)


def _logsumexp(maxima: Array, sums: Array) -> Array:
    """float32[n] from per-block maxima and sums [n, B]."""
    largest = maxima.max(axis=1)
    total: Array = largest + np.log((sums * np.exp(maxima - largest[:, None])).sum(axis=1))
    return total


def local_logits_stats(
    target_local_argmax_ptr: Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    num_speculative_steps: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
) -> None:
    """Per block: argmax and maximum of greedy rows; maximum and sum of exponentials of sampled rows, target and draft."""
    states, steps = expanded_idx_mapping_ptr.numpy(), expanded_local_pos_ptr.numpy()
    temperature = temp_ptr.numpy()[states]
    drafted = steps < num_speculative_steps
    target = float_rows(target_logits_ptr)[:, :vocab_size]

    greedy = np.flatnonzero(drafted & (temperature == 0.0))
    if len(greedy):
        best, largest = block_argmax(target[greedy], BLOCK_SIZE)
        target_local_argmax_ptr.numpy()[greedy] = best
        target_local_max_ptr.numpy()[greedy] = largest

    sampled = np.flatnonzero(drafted & (temperature != 0.0))
    if not len(sampled):
        return
    largest, total = _max_and_sumexp(target[sampled], BLOCK_SIZE)
    target_local_max_ptr.numpy()[sampled] = largest
    target_local_sumexp_ptr.numpy()[sampled] = total
    if HAS_DRAFT_LOGITS:
        assert draft_logits_ptr is not None
        draft = float_rows(draft_logits_ptr[torch.from_numpy(states[sampled]), torch.from_numpy(steps[sampled])])
        largest, total = _max_and_sumexp(draft[:, :vocab_size] / temperature[sampled, None], BLOCK_SIZE)
        draft_local_max_ptr.numpy()[sampled] = largest
        draft_local_sumexp_ptr.numpy()[sampled] = total


class Ratios:
    """log p(token) of target and draft at given logits rows, from the per-block statistics."""

    def __init__(
        self,
        target_logits: Tensor,
        target_max: Tensor,
        target_sumexp: Tensor,
        draft_logits: Tensor | None,
        draft_max: Tensor,
        draft_sumexp: Tensor,
    ) -> None:
        self.target, self.draft = target_logits, draft_logits
        self.target_stats = (target_max.numpy(), target_sumexp.numpy())
        self.draft_stats = (draft_max.numpy(), draft_sumexp.numpy())

    def target_lse(self, rows: Array) -> Array:
        maxima, sums = self.target_stats
        return _logsumexp(maxima[rows], sums[rows])

    def draft_lse(self, rows: Array) -> Array:
        if self.draft is None:
            return np.zeros(len(rows), dtype=np.float32)
        maxima, sums = self.draft_stats
        return _logsumexp(maxima[rows], sums[rows])

    def target_logprob(self, rows: Array, tokens: Array) -> Array:
        return float_rows(self.target[torch.from_numpy(rows), torch.from_numpy(tokens)]) - self.target_lse(rows)

    def draft_logprob(self, rows: Array, tokens: Array, states: Array, step: int, temperature: Array) -> Array:
        if self.draft is None:  # a draft without logits is a point mass
            return np.zeros(len(rows), dtype=np.float32)
        logit = float_rows(self.draft[torch.from_numpy(states), step, torch.from_numpy(tokens)])
        difference: Array = logit / temperature - self.draft_lse(rows)
        return difference


def cumulative_log_p(
    cumulative_log_p_ptr: Tensor,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_sampled_ptr: Tensor,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    num_warps: int = 1,
) -> None:
    """Running min(log p + log M_b/M_s, 0) of block verification; a placeholder draft carries the value on."""
    ratios = Ratios(
        target_logits_ptr,
        target_local_max_ptr,
        target_local_sumexp_ptr,
        draft_logits_ptr,
        draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )
    cu_num_logits = cu_num_logits_ptr.numpy().astype(np.int64)
    states = idx_mapping_ptr.numpy()
    temperature = temp_ptr.numpy()[states]
    start = cu_num_logits[:-1]
    num_drafts = np.where(temperature == 0.0, 0, cu_num_logits[1:] - start - 1)
    log_p = np.zeros(len(states), dtype=np.float32)
    drafts, out = draft_sampled_ptr.numpy(), cumulative_log_p_ptr.numpy()
    for step in range(int(num_drafts.max(initial=0))):
        here = np.flatnonzero(step < num_drafts)
        token = drafts[start[here] + step + 1].astype(np.int64)
        real, token = here[token >= 0], token[token >= 0]
        rows = start[real] + step
        ratio = ratios.target_logprob(rows, token)
        ratio = ratio - ratios.draft_logprob(rows, token, states[real], step, temperature[real])
        log_p[real] = np.minimum(log_p[real] + ratio, np.float32(0.0))
        out[start[here] + step] = log_p[here]


def local_residual_mass(
    local_residual_mass_ptr: Tensor,
    local_residual_mass_stride: int,
    cumulative_log_p_ptr: Tensor,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_logits_ptr: Tensor,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    draft_sampled_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    num_speculative_steps: int,
    vocab_num_blocks: int,
    BLOCK_SIZE: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
) -> None:
    """Per block the mass of max(p M_b - M_s, 0), for rows of sampled requests that have a draft before and behind."""
    states, steps = expanded_idx_mapping_ptr.numpy(), expanded_local_pos_ptr.numpy()
    temperature = temp_ptr.numpy()[states]
    drafts = draft_sampled_ptr.numpy()
    wanted = (steps > 0) & (steps < num_speculative_steps) & (temperature != 0.0)
    wanted[-1:] = False
    wanted[:-1] &= drafts[1 : len(states)] >= 0
    rows = np.flatnonzero(wanted)
    if not len(rows):
        return
    ratios = Ratios(
        target_logits_ptr,
        target_local_max_ptr,
        target_local_sumexp_ptr,
        draft_logits_ptr,
        draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )
    target = float_rows(target_logits_ptr)[rows, :vocab_size] - ratios.target_lse(rows)[:, None]
    draft = float_rows(draft_logits_ptr[torch.from_numpy(states[rows]), torch.from_numpy(steps[rows])])[:, :vocab_size]
    draft = draft / temperature[rows, None] - ratios.draft_lse(rows)[:, None]
    before = np.exp(cumulative_log_p_ptr.numpy()[rows - 1])[:, None]
    mass = np.maximum(before * np.exp(target) - np.exp(draft), np.float32(0.0))
    local_residual_mass_ptr.numpy()[rows] = np.stack([part.sum(axis=1) for part in _blocks(mass, BLOCK_SIZE)], axis=1)


_UTILS = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils."
KERNELS = {
    _UTILS + "_compute_local_logits_stats_kernel": local_logits_stats,
    _UTILS + "_compute_cumulative_log_p_kernel": cumulative_log_p,
    _UTILS + "_compute_local_residual_mass_kernel": local_residual_mass,
}
