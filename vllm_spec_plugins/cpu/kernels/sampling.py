# SPDX-License-Identifier: Apache-2.0
"""Temperature, min-p and Gumbel-max sampling (vllm/v1/worker/gpu/sample/gumbel.py, min_p.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.noise import gumbel_noise
from vllm_spec_plugins.cpu.kernels.views import block_argmax, float_rows

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
    temperature = temperature_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    rows = np.flatnonzero((temperature != 0.0) & (temperature != 1.0))
    logits = float_rows(logits_ptr)[rows] / temperature[rows, None]
    logits_ptr[torch.from_numpy(rows)] = torch.from_numpy(logits).to(logits_ptr.dtype)


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
    """Argmax per block of BLOCK_SIZE tokens of logits plus Gumbel noise (no noise at temperature 0).

    Drafting keeps the logits in the cache before the temperature is applied: the verifier divides them itself.
    """
    states = expanded_idx_mapping_ptr.numpy()
    real = states >= 0
    known = np.where(real, states, 0)
    temperature = np.where(real, temp_ptr.numpy()[known], np.float32(0.0))
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None and logits_cache_source_ptr is not None
        rows = torch.from_numpy(np.flatnonzero(real))
        column = logits_cache_col_ptr[rows] if PER_TOKEN_COL else logits_cache_col_ptr
        cached = logits_cache_source_ptr[rows, :vocab_size]
        logits_cache_ptr[torch.from_numpy(states[real]), column, :vocab_size] = cached

    logits = float_rows(logits_ptr)
    if USE_FP64 or temperature.any():
        logits = logits.astype(np.float64 if USE_FP64 else np.float32)
        rows = np.flatnonzero(temperature)
        scores = float_rows(logits_ptr)[rows]
        if APPLY_TEMPERATURE:
            scores = scores / temperature[rows, None]
        seeds = np.where(real, seeds_ptr.numpy()[known], 0)[rows]
        positions = pos_ptr.numpy()[rows]
        logits[rows] = scores + gumbel_noise(seeds, positions, vocab_size, IS_DRAFTING, USE_FP64)

    best, largest = block_argmax(logits, BLOCK_SIZE)
    local_argmax_ptr.numpy()[...] = best
    local_max_ptr.numpy()[...] = largest


_SAMPLE = "vllm.v1.worker.gpu.sample."
KERNELS = {
    _SAMPLE + "gumbel._temperature_kernel": apply_temperature,
    _SAMPLE + "gumbel._gumbel_sample_kernel": gumbel_sample,
    _SAMPLE + "min_p._min_p_kernel": min_p,
}
