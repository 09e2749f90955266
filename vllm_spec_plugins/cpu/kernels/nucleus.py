# SPDX-License-Identifier: Apache-2.0
"""Top-k and top-p without sorting the vocabulary (vllm/v1/sample/ops/topk_topp_sampler.py).

vLLM's torch version sorts every row together with its indices, which costs more than a layer of a tiny model. The cut
needs values only, and of those only the ones near it: whatever is so improbable that all of it stays outside the nucleus
is masked without being sorted.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.views import Array

Tensor = torch.Tensor


def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """Mask what is not among the k largest logits and not in the nucleus of mass p of those; returns the masked logits.

    logits: float32[n, vocab_size], masked in place (of another dtype: a float32 copy); k: int[n], p: float32[n].
    Ties as in vLLM's torch version: equals of the k-th largest are all kept;
    of equals at the edge of the nucleus those with the lower token ids go first. The largest is always kept.
    """
    logits = logits.float()
    rows: Array = logits.numpy()
    vocab_size = rows.shape[1]
    if k is not None:
        for row, keep in zip(rows, k.tolist(), strict=True):
            if keep < vocab_size:
                row[row < np.partition(row, vocab_size - keep)[vocab_size - keep]] = -np.inf
    if p is not None:
        weights = np.exp(rows - rows.max(axis=1, keepdims=True))
        # In float32, as vLLM: 1 - p is part of the definition of the cut.
        outside = (np.float32(1.0) - p.numpy()) * weights.sum(axis=1)
        for row, weight, budget in zip(rows, weights, outside, strict=True):
            _keep_nucleus(row, weight, budget)
    return logits


# A first guess: tokens of less than this part of the mass outside are few enough to stay there together.
_GUESS = np.float32(1.0 / 64.0)


def _keep_nucleus(row: Array, weights: Array, budget: np.float32) -> None:
    """Mask the smallest weights of one row as long as their sum is at most `budget`, but never the largest one."""
    floor, total = budget * _GUESS, weights.sum()
    while True:
        near = weights[weights >= floor]
        left_out = total - near.sum()
        if left_out <= budget * np.float32(0.99):
            break
        floor = floor * np.float32(1e-2) if floor * len(row) > budget else np.float32(0.0)
    near.sort()
    left_out = max(left_out, np.float32(0.0)) if len(near) < len(row) else np.float32(0.0)
    cut = min(int(np.searchsorted(np.cumsum(near), budget - left_out, side="right")), len(near) - 1)
    edge = near[cut]
    equals = cut - int(np.searchsorted(near, edge))  # of the tokens at the edge, how many are outside
    if equals:
        row[np.flatnonzero(weights == edge)[:equals]] = -np.inf
    row[weights < edge] = -np.inf
