# SPDX-License-Identifier: Apache-2.0
"""Outputs for kernels: poisoned, with guard bytes behind them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

GUARD, GUARD_BYTES = 0xA5, 64


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """NaN, or random integers, in contiguous memory with a guard behind it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size * dtype.itemsize + GUARD_BYTES,), GUARD, dtype=torch.uint8)
    out = memory[: size * dtype.itemsize].view(dtype).view(shape)
    if dtype.is_floating_point:
        return out.fill_(float("nan"))
    return out.copy_(torch.randint(1 << 30, shape, generator=rng))


def guards_hold(out: Tensor) -> bool:
    """Whether nothing was written behind a tensor of `poisoned`."""
    storage = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
    return cast(bool, (storage[out.numel() * out.itemsize :] == GUARD).all().item())
