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


def spread(starts: Array, lengths: Array) -> Array:
    """The concatenated ranges [starts[i], starts[i] + lengths[i]): int64[sum(lengths)]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


@lru_cache(maxsize=256)
def at_address(address: int, rows: int, columns: int) -> Array:
    """int32[rows, columns] at a raw address: what a kernel that gets pointers to tensors sees.

    The caller vouches for the memory: it lives as long as the tensor whose data_ptr() was put into the launch.
    """
    buffer = (ctypes.c_int32 * (rows * columns)).from_address(address)
    return np.frombuffer(buffer, dtype=np.int32).reshape(rows, columns)


def float_rows(logits: torch.Tensor) -> Array:
    """Rows of logits for reading: a float32 view, or a float32 copy of a 16-bit tensor."""
    return logits.detach().float().numpy()
