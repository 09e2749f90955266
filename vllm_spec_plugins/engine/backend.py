# SPDX-License-Identifier: Apache-2.0
"""Which attention backend verifies trees on a device.

Both modules have `kind_of`, `check_layout` and `only_trees`. They are imported when an engine is made: one needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_spec_plugins import compiled


def on_triton(device: torch.device) -> bool:
    """Whether trees are verified by the Triton backend, on K/V caches laid out as it has them."""
    return device.type == "cuda" or compiled.use_kernels


def backend_of(device: torch.device) -> Any:
    """The module of the attention backend."""
    if on_triton(device):
        from vllm_spec_plugins.engine import triton_attention

        return triton_attention
    from vllm_spec_plugins.engine import attention

    return attention
