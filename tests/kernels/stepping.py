# SPDX-License-Identifier: Apache-2.0
"""Kernels whose programs part, run by Triton's interpreter as it comes, or in step.

    python -m tests.kernels.stepping SEED one-by-one|in-step

Prints one JSON object: results by name, how often programs parted, and what is refused.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl


@triton.jit
def collatz_kernel(value_ptr, steps_ptr, visits_ptr):
    """Every program its own number of rounds; what is counted before they part is counted once."""
    at = tl.program_id(0)
    tl.store(visits_ptr + at, tl.load(visits_ptr + at) + 1)
    value, steps = tl.load(value_ptr + at), 0
    while value != 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    if steps > 20:
        return
    tl.store(steps_ptr + at, steps)


@triton.jit
def _later(left, left_at, right, right_at):
    """Of equal values the one that stands behind."""
    keeps = left > right
    return tl.where(keeps, left, right), tl.where(keeps, left_at, right_at)


@triton.jit
def _higher(left, right):
    return tl.where(left > right, left, right)


@triton.jit
def blocks_kernel(x_ptr, count_ptr, out_ptr, place_ptr, N: tl.constexpr):
    """Operations that speak of axes and shapes, under bounds that differ."""
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    n = tl.arange(0, N)
    x = tl.load(x_ptr + row * N + n)
    square = x[:, None] * tl.load(x_ptr + n)[None, :]
    acc = tl.zeros([N, N], dtype=tl.float32)
    for i in range(tl.load(count_ptr + row)):
        acc = tl.dot(square + i, tl.trans(square), acc, input_precision="ieee")
    line = tl.sum(acc, 1) + tl.max(tl.abs(acc), 0) + tl.cumsum(x, 0, reverse=True)
    line += tl.associative_scan(x, 0, _higher) + tl.gather(x, (n + row) % N, 0)
    line += tl.min(tl.reshape(square, [N * N]), 0) + tl.sum(square)
    left, right = tl.split(tl.join(x, line))
    line = tl.where(n % 2 == 0, left, right)
    high, at = tl.reduce((tl.floor(tl.abs(line)), n), 0, _later)
    top, first = tl.max(line, 0, return_indices=True)
    tl.store(out_ptr + row * N + n, line + high + top, mask=n != first)
    if tl.sum((x > 0).to(tl.int32)) > N // 2:
        tl.store(place_ptr + row, at + first)


@triton.jit
def marks_kernel(bits_ptr, sums_ptr, N: tl.constexpr, EARLY: tl.constexpr):
    """Atomic operations: those that may be done twice in front of a branch, sums behind it or (EARLY) in front."""
    at = tl.program_id(0)
    n = tl.arange(0, N)
    tl.atomic_or(bits_ptr + n % 3, 1 << (at + n), mask=n < at)
    if EARLY:
        tl.atomic_add(sums_ptr, 1)
    if at % 2 == 1:
        tl.atomic_add(sums_ptr + n % 3, at, mask=n <= at)


def run(seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}

    count = 700  # more than run in step at a time
    value = torch.randint(1, 60, (count,), generator=rng, dtype=torch.int32)
    steps, visits = torch.full((count,), -1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    collatz_kernel[(count,)](value, steps, visits)
    found |= {"steps": steps.tolist(), "visits": visits.tolist()}

    rows, size = 15, 16
    x = torch.randint(-3, 4, (rows, size), generator=rng).float()  # whole: exact in any order
    bounds = torch.randint(0, 4, (rows,), generator=rng, dtype=torch.int32)
    out, place = torch.full((rows, size), 7.5), torch.full((rows,), -1, dtype=torch.int32)
    blocks_kernel[(3, 5)](x, bounds, out, place, size)
    found |= {"out": out.tolist(), "place": place.tolist()}

    bits, sums = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    marks_kernel[(9,)](bits, sums, 8, False)
    found |= {"bits": bits.tolist(), "sums": sums.tolist()}
    try:
        marks_kernel[(9,)](bits, sums, 8, True)
        found["refused"] = ""
    except Exception as error:
        found["refused"] = str(error)
    return found


def main(seed: int, how: str) -> dict[str, Any]:
    if how == "one-by-one":
        return {**run(seed), "parted": 0}
    from vllm_spec_plugins.cpu import lockstep

    lockstep.enable()
    parted, part = [0], lockstep.Programs._part

    def counted(self: Any, rows: Any) -> None:
        parted[0] += 1
        part(self, rows)

    lockstep.Programs._part = counted  # type: ignore[method-assign]
    return {**run(seed), "parted": parted[0]}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
