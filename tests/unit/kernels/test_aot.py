# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that are not here: what one needs is reported, and what cannot be compiled is refused."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from tests.unit.kernels.aot import SHARED_LIMIT, compile_for

POINTERS = {"x_ptr": "*fp32", "out_ptr": "*fp32"}


@triton.jit
def _centred(x_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    column = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + column)
    tl.store(out_ptr + column, x - tl.sum(x) / BLOCK_SIZE)


@triton.jit
def _product(x_ptr, out_ptr, stride, blocks, BLOCK_SIZE: tl.constexpr):
    row, column = tl.arange(0, BLOCK_SIZE)[:, None], tl.arange(0, BLOCK_SIZE)[None, :]
    total = tl.zeros([BLOCK_SIZE, BLOCK_SIZE], tl.float32)
    for block in range(blocks):
        x = tl.load(x_ptr + (block * BLOCK_SIZE + row) * stride + column)
        total = tl.dot(x, tl.trans(x), total)
    tl.store(out_ptr + row * stride + column, total)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_whose_values_fit_is_compiled_without_spills(capability: int) -> None:
    usage = compile_for(_centred, POINTERS, {(2,): 1024}, capability, num_warps=4, num_stages=1)
    assert 8 <= usage.registers <= 64
    assert usage.spills == 0
    assert 0 < usage.shared < 4096  # the sum goes through shared memory, once per warp


@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_whose_values_do_not_fit_is_reported_as_spilling(capability: int) -> None:
    """16384 values in one warp are 512 for each thread, and a thread has 255 registers."""
    usage = compile_for(_centred, POINTERS, {"BLOCK_SIZE": 16384}, capability, num_warps=1, num_stages=1)
    assert usage.spills >= (512 - 255) * 4


def test_shared_memory_grows_with_the_stages_of_a_pipeline() -> None:
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "stride": "i32", "blocks": "i32"}
    two, three = (
        compile_for(_product, signature, {"BLOCK_SIZE": 64}, 80, num_warps=4, num_stages=stages, aligned=["stride"])
        for stages in (2, 3)
    )
    assert two.shared + 64 * 64 * 2 == three.shared < min(SHARED_LIMIT.values())


def test_what_the_compiler_refuses_is_an_error() -> None:
    with pytest.raises(triton.CompilationError, match="power of 2"):
        compile_for(_centred, POINTERS, {"BLOCK_SIZE": 1000}, 90, num_warps=4, num_stages=1)
