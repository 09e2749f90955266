# SPDX-License-Identifier: Apache-2.0
"""Memory for a kernel to write: poisoned, and with words in front of it and behind it that must stay as they are."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

GUARD = 32  # words
GUARD_BYTES = bytes([0xA5] * 64)


class Guarded:
    """Hands out tensors for results, and tells whether anything was written beside them."""

    def __init__(self, rng: torch.Generator) -> None:
        self._rng = rng
        self._given: list[tuple[Tensor, Tensor]] = []

    def __call__(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of NaN (floats) or random words (integers)."""
        size = torch.Size(shape).numel() + 2 * GUARD
        if dtype.is_floating_point:
            memory = torch.full((size,), float("nan"), dtype=dtype)
        else:
            top = min(torch.iinfo(dtype).max, 1 << 40)
            memory = torch.randint(-top // 2, top, (size,), generator=self._rng).to(dtype)
        self._given.append((memory, memory.clone()))
        return memory[GUARD:-GUARD].view(shape)

    def holding(self, values: Tensor) -> Tensor:
        """A tensor of what is in `values`, to be changed in place."""
        return self(values.shape, values.dtype).copy_(values)

    def assert_untouched(self) -> None:
        """Every word outside of the tensors given is what it was."""
        for memory, before in self._given:
            for part in (slice(None, GUARD), slice(-GUARD, None)):
                torch.testing.assert_close(memory[part], before[part], rtol=0, atol=0, equal_nan=True)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """NaN, or random integers, in contiguous memory with a guard behind it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size * dtype.itemsize + len(GUARD_BYTES),), GUARD_BYTES[0], dtype=torch.uint8)
    out = memory[: size * dtype.itemsize].view(dtype).view(shape)
    if dtype.is_floating_point:
        return out.fill_(float("nan"))
    return out.copy_(torch.randint(1 << 30, shape, generator=rng))


def guards_hold(out: Tensor) -> bool:
    """Whether nothing was written behind a tensor of `poisoned`."""
    storage = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
    return cast(bool, (storage[out.numel() * out.itemsize :] == GUARD_BYTES[0]).all().item())
