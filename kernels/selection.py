# SPDX-License-Identifier: Apache-2.0
"""What several kernels do with a vector of chances that lies in registers: find those that are worth a node, and store them.

Chances are at least 0, so as integers of their own bits they sort as they do; -1 stands for what is no candidate. On
bits every comparison is exact, and a threshold that comes as a kernel's argument keeps all of its 64 bits (Triton makes
a float32 of a float).
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def bits_of(value: float) -> int:
    """The bits of a float64, of 0 if it is less."""
    return int(struct.unpack(">q", struct.pack(">d", max(value, 0.0) + 0.0))[0])


def digit_for(candidates: int, warps: int) -> int:
    """DIGIT of `kth_largest`: the more, the fewer rounds; 2^DIGIT * candidates values share the registers of the warps."""
    return 7 if candidates <= 16 * warps else 3 if candidates <= 64 * warps else 1


@triton.jit
def kth_largest(bits, k, DIGIT: tl.constexpr):
    """The largest integer x >= 0 that at least `k` of `bits` [C] int64 reach; 0 if fewer are >= 0.

    Digit by digit, DIGIT bits each, a divisor of 63: a round is one comparison with all values of the digit, a sum and a
    maximum, so there are 63 / DIGIT rounds whatever k. A sort takes log2(C)^2 / 2 exchanges of the vector, and k searches
    for the maximum take k maxima.
    """
    found = tl.full((), 0, tl.int64)
    digits = tl.arange(0, 1 << DIGIT).to(tl.int64)
    for part in range(63 // DIGIT):
        higher = found | (digits << (63 - DIGIT * (part + 1)))
        reached = tl.sum((bits[None, :] >= higher[:, None]).to(tl.int32), 1) >= k
        found = tl.max(tl.where(reached, higher, found))
    return found


@triton.jit
def best(bits, limit, least, DIGIT: tl.constexpr):
    """Which of `bits` [C] int64 are the `limit` largest and reach `least` >= 0; of equals those that stand first."""
    floor = kth_largest(bits, limit, DIGIT)
    above = bits > floor
    level = (bits == floor).to(tl.int32)
    first = (level > 0) & (tl.cumsum(level) <= limit - tl.sum(above.to(tl.int32)))
    return (above | first) & (bits >= least)


@triton.jit
def store_tree(tokens_ptr, parents_ptr, chance_ptr, place, kept, token, parent, chance, nodes, BLOCK_N: tl.constexpr):
    """Write a tree [nodes]: the nodes that are `kept`, each at its `place` from 0 on, and behind them what is absent."""
    tl.store(tokens_ptr + place, token, mask=kept)
    tl.store(parents_ptr + place, parent.to(tl.int64), mask=kept)
    tl.store(chance_ptr + place, chance, mask=kept)
    rest = tl.arange(0, BLOCK_N)
    absent = (rest >= tl.sum(kept.to(tl.int32))) & (rest < nodes)
    nothing = tl.zeros([BLOCK_N], tl.int64)
    tl.store(tokens_ptr + rest, nothing - 1, mask=absent)
    tl.store(parents_ptr + rest, nothing, mask=absent)
    tl.store(chance_ptr + rest, nothing.to(chance.dtype), mask=absent)
