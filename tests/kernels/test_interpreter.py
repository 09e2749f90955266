# SPDX-License-Identifier: Apache-2.0
"""What every test of this folder builds on: kernels run here, on CPU tensors, and write nothing behind a mask."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _scaled_sum(x_ptr, out_ptr, row_stride, columns, scale, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + row * row_stride + column, mask=column < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(x.to(tl.float32)) * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_reads_strided_rows_of_cpu_tensors_and_nothing_behind_them(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    x = torch.full((7, 32), float("nan"), dtype=dtype)
    x[:, :19] = torch.randn(7, 19, generator=rng)
    out = torch.full((9,), float("nan"))
    _scaled_sum[(7,)](x, out, x.stride(0), 19, 0.5, BLOCK_SIZE=32)
    torch.testing.assert_close(out[:7], x[:, :19].float().sum(1) * 0.5, rtol=1e-5, atol=1e-5)
    assert out[7:].isnan().all()


def test_a_column_too_many_is_seen(rng: torch.Generator) -> None:
    """The control: poison that is read shows in the result."""
    x = torch.full((7, 32), float("nan"))
    x[:, :19] = torch.randn(7, 19, generator=rng)
    out = torch.empty(7)
    _scaled_sum[(7,)](x, out, x.stride(0), 20, 0.5, BLOCK_SIZE=32)
    assert out.isnan().all()
