# SPDX-License-Identifier: Apache-2.0
"""Temperature, min-p and Gumbel-max sampling (vllm/v1/worker/gpu/sample/gumbel.py, min_p.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.noise import gumbel_argmax
from vllm_spec_plugins.cpu.kernels.views import Array, float_rows, view

Tensor = torch.Tensor


def apply_temperature(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    temperature_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Divide each row by its request's temperature in place; 0 (greedy) and 1 leave the row alone."""
    temperature = view(temperature_ptr)[view(expanded_idx_mapping_ptr)]
    # Division by 1 changes no bit.
    divisor = np.where(temperature == 0.0, np.float32(1.0), temperature)[:, None]
    logits = logits_ptr.numpy()
    np.divide(logits, divisor, out=logits)


def min_p(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    min_p_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Mask tokens whose probability is below min_p times the largest: logit < max + log(min_p), in place."""
    ratio = min_p_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    rows = np.flatnonzero(ratio != 0.0)
    if not len(rows):
        return
    logits = float_rows(logits_ptr)[rows]
    threshold = logits.max(axis=1) + np.log(ratio[rows])
    below = torch.from_numpy(logits < threshold[:, None])
    index = torch.from_numpy(rows)
    logits_ptr[index] = logits_ptr[index].masked_fill_(below, -torch.inf)


def draw(
    logits: Tensor,
    expanded_idx_mapping: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    apply_temperature: bool,
    drafting: bool,
    fp64: bool,
) -> tuple[Array, Array]:
    """Token drawn for each row of logits [n, vocab_size] and its noised logit: int64[n], float32[n] (float64[n]).

    expanded_idx_mapping: [n] request states, -1 for rows that pad (drawn greedily); temperature and seeds are indexed
    by it. Temperature 0 is greedy.
    """
    states = view(expanded_idx_mapping)
    scale = view(temperature)[states]
    if np.count_nonzero(states < 0):
        scale[states < 0] = 0.0
    rows, at = float_rows(logits), view(positions)
    noisy = np.flatnonzero(scale)
    if len(noisy) == len(rows):  # all rows are sampled
        return gumbel_argmax(rows, scale if apply_temperature else None, view(seeds)[states], at, drafting, fp64)
    best = rows.argmax(axis=1)
    largest = rows[np.arange(len(best)), best]
    if len(noisy):
        largest = largest.astype(np.float64) if fp64 else largest
        best[noisy], largest[noisy] = gumbel_argmax(
            rows[noisy],
            scale[noisy] if apply_temperature else None,
            view(seeds)[states[noisy]],
            at[noisy],
            drafting,
            fp64,
        )
    return best, largest


def gumbel_sample(
    local_argmax_ptr: Tensor,
    local_argmax_stride: int,
    local_max_ptr: Tensor,
    local_max_stride: int,
    logits_cache_ptr: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: Tensor | None,
    logits_cache_source_ptr: Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    seeds_ptr: Tensor,
    pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Argmax of logits plus Gumbel noise (no noise at temperature 0), the first one of equals.

    Of the blocks of BLOCK_SIZE tokens only the winner's argmax and maximum are written; the others' maximum is -inf.
    Drafting keeps the logits in the cache before the temperature is applied: the verifier divides them itself.
    """
    states = expanded_idx_mapping_ptr.numpy()
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None and logits_cache_source_ptr is not None
        real = np.flatnonzero(states >= 0)
        rows = torch.from_numpy(real)
        column = logits_cache_col_ptr[rows] if PER_TOKEN_COL else logits_cache_col_ptr
        cached = logits_cache_source_ptr[rows, :vocab_size]
        logits_cache_ptr[torch.from_numpy(states[real]), column, :vocab_size] = cached

    best, largest = draw(
        logits_ptr, expanded_idx_mapping_ptr, temp_ptr, seeds_ptr, pos_ptr, APPLY_TEMPERATURE, IS_DRAFTING, USE_FP64
    )
    every, block = np.arange(len(best)), best // BLOCK_SIZE
    local_argmax, local_max = local_argmax_ptr.numpy(), local_max_ptr.numpy()
    local_max.fill(-np.inf)
    local_max[every, block] = largest
    local_argmax[every, block] = best


_SAMPLE = "vllm.v1.worker.gpu.sample."
KERNELS = {
    _SAMPLE + "gumbel._temperature_kernel": apply_temperature,
    _SAMPLE + "gumbel._gumbel_sample_kernel": gumbel_sample,
    _SAMPLE + "min_p._min_p_kernel": min_p,
}
