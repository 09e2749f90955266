# SPDX-License-Identifier: Apache-2.0
"""NumPy views of CPU tensors, and the index arithmetic that the kernels share.

The kernels work on rows of a few integers each, where the fixed cost of an operation is everything: NumPy's is a
third of torch's. A view shares the tensor's memory, so writing to it is writing to the tensor.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def view(tensor: torch.Tensor) -> Array:
    """The tensor's memory as an array. Kept on the tensor: `Tensor.numpy` costs five times an indexing operation.

    Of an alias, or the array would keep the tensor alive and the tensor the array.
    """
    found: Array | None = getattr(tensor, "_spec_plugins_view", None)
    if found is None:
        found = tensor.detach().numpy()
        tensor._spec_plugins_view = found  # type: ignore[attr-defined]
    return found


def spread(starts: Array, lengths: Array) -> Array:
    """The concatenated ranges [starts[i], starts[i] + lengths[i]): int64[sum(lengths)]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def listed(counts: Array) -> tuple[Array, Array]:
    """Every pair (i, j) with j < counts[i], in order: two int64 arrays."""
    most = int(counts.max(initial=0))
    row, column = np.nonzero(np.arange(most) < counts[:, None])
    return row, column


@lru_cache(maxsize=256)
def at_address(address: int, rows: int, columns: int) -> Array:
    """int32[rows, columns] at a raw address: what a kernel that gets pointers to tensors sees.

    The caller vouches for the memory: it lives as long as the tensor whose data_ptr() was put into the launch.
    """
    buffer = (ctypes.c_int32 * (rows * columns)).from_address(address)
    return np.ctypeslib.as_array(buffer).reshape(rows, columns)


def float_rows(logits: torch.Tensor) -> Array:
    """Rows of logits for reading: a float32 view, or a float32 copy of a 16-bit tensor."""
    rows: Array = logits.detach().float().numpy()
    return rows


def block_argmax(logits: Array, size: int) -> tuple[Array, Array]:
    """Per block of `size` columns: the column of the first maximum, int64[n, B], and the maximum, [n, B]."""
    best, largest = [], []
    for begin in range(0, logits.shape[1], size):
        part = logits[:, begin : begin + size]
        column = part.argmax(axis=1)
        best.append(column + begin)
        largest.append(part[np.arange(len(part)), column])
    return np.stack(best, axis=1), np.stack(largest, axis=1)
