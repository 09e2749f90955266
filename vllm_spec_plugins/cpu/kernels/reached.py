# SPDX-License-Identifier: Apache-2.0
"""Verification of sampled requests on the CPU: the rows that the walk reaches are drawn, the others are not."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels import loops
from vllm_spec_plugins.cpu.kernels.nucleus import options
from vllm_spec_plugins.cpu.kernels.views import Array
from vllm_spec_plugins.tree.tree import TokenTree

Tensor = torch.Tensor


def draw_reached(
    logits: Tensor,
    tree: TokenTree,
    num_rows: Array,
    temperature: Array,
    seeds: Array,
    positions: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> Tensor:
    """The walk's draws: [B, N + 1] int64, -1 at rows that it does not reach.

    Args:
        logits: float32[L, V] (of another dtype: a copy), request by request, with the temperature applied; rows reached
            are masked by top-k and top-p in place.
        num_rows: int64[B], rows of each request, its root's included.
        temperature: float32[B], 0 = greedy; seeds: int64[B].
        positions: int64[L]; top_k: int32[L], top_p: float32[L], or None.
    """
    rows = np.ascontiguousarray(logits.float().numpy())
    tokens, parents = tree.tokens.numpy(), tree.parents.numpy()
    drawn = loops.draw_reached(
        rows, tokens, parents, num_rows - 1, temperature, seeds, positions.numpy(), *options(top_k, top_p)
    )
    return torch.from_numpy(drawn)
