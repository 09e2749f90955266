# SPDX-License-Identifier: Apache-2.0
"""What a stage of a step is computed by: a compiled loop on the CPU, a Triton kernel on a GPU, torch operations elsewhere.

A step of a small model on a CPU is made of operations on a few integers. In torch each costs about 5 us whatever its
size, in NumPy 1 to 2 us; a compiled loop does a whole stage of the step for the price of one of them. What has such a
loop computes the same in torch for every other device.

Where both are there the order is loops, kernels, torch. Loops are compiled by numba, which vLLM brings. Their modules, and those
of kernels, are imported where one is first needed: a process that serves without a plugin must not load numba, nor one without
a GPU Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])

# Tests switch it off to run the tensor code on a CPU.
use_loops = True
# The interpreted lane (cpu/interpreted.py) switches it on: Triton's interpreter runs the kernels on a CPU, and no loop is asked.
use_kernels = False


def loops_for(tensor: Tensor) -> bool:
    """Whether what is asked about `tensor` is answered by a compiled loop."""
    return use_loops and not use_kernels and tensor.device.type == "cpu"


def kernels_for(tensor: Tensor) -> bool:
    """Whether what is asked about `tensor` is answered by a Triton kernel (kernels/)."""
    return tensor.is_cuda or (use_kernels and tensor.device.type == "cpu")


def compiled(function: F) -> F:
    """`function` as machine code, kept on disk between processes where there is a place to keep it.

    Floating-point operations are done one by one, in the order written and in the types of their operands. A compiled
    function calls compiled functions of its own file only: what is kept on disk is renewed when that file changes.
    """
    import numba

    settings = {"error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return numba.njit(**settings)(function)
