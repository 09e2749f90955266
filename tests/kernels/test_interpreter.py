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


@triton.jit
def _converted(x_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The finite 8-bit float next to each of `x`, of two the one with an even code: [n] float32."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(dtype).double()
    values = values[values.isfinite()]
    distance = (x.double().abs().clamp(max=values[-1]).unsqueeze(1) - values).abs()
    closest = distance == distance.amin(1, keepdim=True)
    even = closest & (codes[: len(values)] % 2 == 0)
    code = torch.where(even.any(1), even.int().argmax(1), closest.int().argmax(1))
    return values[code].float().copysign(x.float())


@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_rounded_to_the_nearest_and_read_as_what_they_are(
    dtype: torch.dtype, wide: torch.dtype, rng: torch.Generator
) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    read = torch.zeros(256, dtype=wide)
    _converted[(2,)](values, read, BLOCK_SIZE=128)
    torch.testing.assert_close(read.float(), values.float(), rtol=0, atol=0, equal_nan=True)

    finite = values.float()[values.float().isfinite()].sort().values
    halves = (finite[:-1] + finite[1:]) / 2  # where rounding up and rounding to even part
    spread = torch.randn(512, generator=rng) * torch.logspace(-6, 5, 512)
    x = torch.cat([finite, halves, spread, torch.tensor([0.0, 1e6, -1e6, float("inf")])]).to(wide)
    x = torch.cat([x, x.new_zeros(-len(x) % 128)])
    written = torch.zeros(len(x), dtype=torch.uint8).view(dtype)
    _converted[(len(x) // 128,)](x, written, BLOCK_SIZE=128)
    assert torch.equal(written.float(), nearest(x, dtype))
    nan, kept = torch.full((128,), float("nan"), dtype=wide), torch.zeros(128, dtype=torch.uint8).view(dtype)
    _converted[(1,)](nan, kept, BLOCK_SIZE=128)
    assert kept.float().isnan().all()
