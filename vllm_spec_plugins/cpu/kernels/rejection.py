# SPDX-License-Identifier: Apache-2.0
"""vLLM's own rejection sampling of draft chains (vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.launch import needs_grid
from vllm_spec_plugins.cpu.kernels.likelihoods import Ratios
from vllm_spec_plugins.cpu.kernels.noise import gumbel_argmax, uniform_philox
from vllm_spec_plugins.cpu.kernels.views import float_rows

Tensor = torch.Tensor


def rejection(
    sampled_ptr: Tensor,
    sampled_stride: int,
    rejected_steps_ptr: Tensor,
    target_rejected_logsumexp_ptr: Tensor,
    draft_rejected_logsumexp_ptr: Tensor,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_local_argmax_ptr: Tensor,
    target_local_argmax_stride: int,
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
    seed_ptr: Tensor,
    pos_ptr: Tensor,
    synthetic_conditional_rates_ptr: Tensor | None,
    cumulative_log_p_ptr: Tensor | None,
    local_residual_mass_ptr: Tensor | None,
    local_residual_mass_stride: int,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    SYNTHETIC_MODE: bool,
    USE_BLOCK_VERIFICATION: bool,
    num_warps: int = 1,
) -> None:
    """Accept drafts from the left: argmax equality (greedy), the ratio test (Leviathan et al. 2023) or blocks (Sun et
    al. 2024). Leaves the accepted length, the tokens, and the normalizers of the row to resample from."""
    ratios = Ratios(
        target_logits_ptr,
        target_local_max_ptr,
        target_local_sumexp_ptr,
        draft_logits_ptr if HAS_DRAFT_LOGITS else None,
        draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )
    states = idx_mapping_ptr.numpy()
    cu_num_logits = cu_num_logits_ptr.numpy().astype(np.int64)
    start, num_drafts = cu_num_logits[:-1], np.diff(cu_num_logits) - 1
    temperature, seeds = temp_ptr.numpy()[states], seed_ptr.numpy()[states]
    is_greedy = temperature == 0.0
    drafts, positions, sampled = draft_sampled_ptr.numpy(), pos_ptr.numpy(), sampled_ptr.numpy()
    length = np.zeros(len(states), dtype=np.int64)
    target_lse, draft_lse = np.zeros((2, len(states)), dtype=np.float32)
    verifying = np.ones(len(states), dtype=np.bool_)

    for step in range(int(num_drafts.max(initial=0))):
        here = np.flatnonzero(verifying & (step < num_drafts))
        token = drafts[start[here] + step + 1].astype(np.int64)
        # A placeholder (-1) ends a sampled request's verification; a greedy one stores its argmax there.
        ends = (token < 0) & ~is_greedy[here]
        verifying[here[ends]] = False
        here, token = here[~ends], token[~ends]
        if not len(here):
            break
        rows = start[here] + step
        uniform = uniform_philox(seeds[here], positions[rows])
        synthetic = None
        if SYNTHETIC_MODE:
            assert synthetic_conditional_rates_ptr is not None
            synthetic = uniform < synthetic_conditional_rates_ptr.numpy()[step]

        greedy = np.flatnonzero(is_greedy[here])
        if len(greedy):
            request, drafted = here[greedy], np.maximum(token[greedy], 0)
            largest = np.nan_to_num(
                target_local_max_ptr.numpy()[rows[greedy]], nan=-np.inf, posinf=np.inf, neginf=-np.inf
            )
            argmax = target_local_argmax_ptr.numpy()[rows[greedy], largest.argmax(axis=1)]
            accepted = (argmax == drafted) if synthetic is None else synthetic[greedy]
            accepted &= token[greedy] >= 0
            sampled[request, step] = np.where(accepted, drafted, argmax)
            length[request] += accepted
            verifying[request] = accepted

        random = np.flatnonzero(~is_greedy[here])
        if not len(random):
            continue
        request, drafted, at, u = here[random], token[random], rows[random], uniform[random]
        sampled[request, step] = drafted
        if USE_BLOCK_VERIFICATION:
            assert cumulative_log_p_ptr is not None
            joint = np.exp(cumulative_log_p_ptr.numpy()[at])
            more = step < num_drafts[request] - 1
            following = np.where(more, drafts[np.where(more, at + 2, 0)], -1).astype(np.int64)
            threshold = joint.copy()
            go = np.flatnonzero(following >= 0)
            if local_residual_mass_ptr is not None:
                mass = local_residual_mass_ptr.numpy()[at[go] + 1].sum(axis=1)
            else:
                mass = joint[go] * (np.float32(1.0) - np.exp(ratios.target_logprob(at[go] + 1, following[go])))
            bound = mass + np.float32(1.0) - joint[go]
            positive = bound > 0.0
            threshold[go] = np.where(positive, mass / np.where(positive, bound, np.float32(1.0)), np.float32(1.0))
            length[request] = np.where(u <= threshold, step + 1, length[request])
            continue
        target_lse[request] = ratios.target_lse(at)
        draft_lse[request] = ratios.draft_lse(at)
        if synthetic is None:
            draft = ratios.draft_logprob(at, drafted, states[request], step, temperature[request])
            accepted = ratios.target_logprob(at, drafted) > np.log(u) + draft
        else:
            accepted = synthetic[random]
        length[request] += accepted
        verifying[request] = accepted

    rejected_steps_ptr.numpy()[:] = length
    if USE_BLOCK_VERIFICATION:
        request = np.flatnonzero(~is_greedy & (length < num_drafts))
        target_lse[request] = ratios.target_lse(start[request] + length[request])
        draft_lse[request] = ratios.draft_lse(start[request] + length[request])
    target_rejected_logsumexp_ptr.numpy()[:] = target_lse
    draft_rejected_logsumexp_ptr.numpy()[:] = draft_lse


@needs_grid
def resample(
    grid: tuple[int, ...],
    resampled_local_argmax_ptr: Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: Tensor,
    resampled_local_max_stride: int,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: Tensor,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: Tensor,
    rejected_step_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    draft_sampled_ptr: Tensor,
    temp_ptr: Tensor,
    seed_ptr: Tensor,
    pos_ptr: Tensor,
    cumulative_log_p_ptr: Tensor | None,
    contexts_ptr: Tensor | None,
    contexts_stride: int,
    watermarking_ptr: Tensor | None,
    watermarking_skip_mask_ptr: Tensor | None,
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> None:
    """Gumbel-max draw from max(p - q, 0) where a draft was rejected, from p where none was left."""
    if WATERMARK:
        raise NotImplementedError("watermarking is not supported without a GPU: remove the watermark settings")
    cu_num_logits = cu_num_logits_ptr.numpy().astype(np.int64)
    steps = rejected_step_ptr.numpy().astype(np.int64)
    rows = cu_num_logits[:-1] + steps
    bonus = rows == cu_num_logits[1:] - 1
    temperature = temp_ptr.numpy()[expanded_idx_mapping_ptr.numpy()[rows]]
    # A greedy request that was rejected has its argmax already.
    request = np.flatnonzero((temperature != 0.0) | bonus)
    rows, bonus, temperature, steps = rows[request], bonus[request], temperature[request], steps[request]
    states = expanded_idx_mapping_ptr.numpy()[rows]
    drafts = draft_sampled_ptr.numpy()
    rejected = np.where(bonus, 0, drafts[np.where(bonus, 0, rows + 1)])
    logits = float_rows(target_logits_ptr)[rows, :vocab_size]

    residual = np.flatnonzero(~bonus & (rejected >= 0))
    if len(residual) and HAS_DRAFT_LOGITS:
        assert draft_logits_ptr is not None
        index = torch.from_numpy(states[residual]), torch.from_numpy(steps[residual])
        draft = float_rows(draft_logits_ptr[index])[:, :vocab_size] / temperature[residual, None]
        draft = draft - draft_rejected_logsumexp_ptr.numpy()[request[residual], None]
        target = logits[residual] - target_rejected_logsumexp_ptr.numpy()[request[residual], None]
        if USE_BLOCK_VERIFICATION:
            assert cumulative_log_p_ptr is not None
            log_p = cumulative_log_p_ptr.numpy()[np.maximum(rows[residual] - 1, 0)]
            target += np.where(steps[residual] > 0, log_p, np.float32(0.0))[:, None]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio = np.exp(draft - target)
            logits[residual] = np.where(ratio < 1.0, target + np.log1p(-ratio), np.float32(-np.inf))
    elif len(residual):
        logits[residual, rejected[residual]] = -np.inf

    best = logits.argmax(axis=1)
    largest = logits[np.arange(len(best)), best].astype(np.float64 if USE_FP64 else np.float32)
    noisy = np.flatnonzero(temperature)
    if len(noisy):
        seeds, positions = seed_ptr.numpy()[states[noisy]], pos_ptr.numpy()[rows[noisy]]
        best[noisy], largest[noisy] = gumbel_argmax(
            logits[noisy], None, seeds, positions, drafting=False, fp64=USE_FP64
        )
    # Of the blocks only the winner's entries are written; the others' maximum is -inf.
    resampled_local_max = resampled_local_max_ptr.numpy()
    resampled_local_max[request] = -np.inf
    resampled_local_max[request, best // BLOCK_SIZE] = largest
    resampled_local_argmax_ptr.numpy()[request, best // BLOCK_SIZE] = best


def insert_resampled(
    sampled_ptr: Tensor,
    sampled_stride: int,
    num_sampled_ptr: Tensor,
    resampled_local_argmax_ptr: Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: Tensor,
    resampled_local_max_stride: int,
    resample_num_blocks: int,
    cu_num_logits_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    temp_ptr: Tensor,
    PADDED_RESAMPLE_NUM_BLOCKS: int,
) -> None:
    """Append the resampled (or bonus) token behind the accepted drafts."""
    cu_num_logits, num_sampled = cu_num_logits_ptr.numpy(), num_sampled_ptr.numpy()
    rows = cu_num_logits[:-1] + num_sampled
    temperature = temp_ptr.numpy()[expanded_idx_mapping_ptr.numpy()[rows]]
    request = np.flatnonzero((temperature != 0.0) | (rows == cu_num_logits[1:] - 1))
    largest = resampled_local_max_ptr.numpy()[request, :resample_num_blocks]
    # A block whose maximum is NaN must not win.
    block = np.where(np.isnan(largest), -np.inf, largest).argmax(axis=1)
    sampled_ptr.numpy()[request, num_sampled[request]] = resampled_local_argmax_ptr.numpy()[request, block]
    num_sampled += 1


_UTILS = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils."
KERNELS = {
    _UTILS + "_rejection_kernel": rejection,
    _UTILS + "_resample_kernel": resample,
    _UTILS + "_insert_resampled_kernel": insert_resampled,
}
