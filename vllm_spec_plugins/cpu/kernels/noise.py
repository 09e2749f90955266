# SPDX-License-Identifier: Apache-2.0
"""The random numbers of vLLM's sampler: the noise of its draws, and Triton's `tl.rand`."""

from __future__ import annotations

import numpy as np

from vllm_spec_plugins.cpu.kernels import loops
from vllm_spec_plugins.cpu.kernels.views import Array

# Drafts draw from a stream of their own: vLLM's ratio test needs noise that is independent of the target's.
DRAFT_SALT = 1 << 30
_U32 = np.uint32


def gumbel_argmax(
    logits: Array, temperature: Array | None, seeds: Array, positions: Array, drafting: bool, fp64: bool
) -> tuple[Array, Array]:
    """Token that maximises logits / temperature + noise, and the maximum: int64[n], float32[n] (float64[n]).

    logits: float32[n, vocab_size]; temperature: float32[n], or None when it is applied already; seeds and positions:
    int64[n].
    """
    count = len(logits)
    scale = np.ones(count, dtype=np.float32) if temperature is None else temperature
    if drafting:
        positions = positions + DRAFT_SALT
    best, noised = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float64 if fp64 else np.float32)
    draw = loops.each_noised64 if fp64 else loops.each_noised
    draw(np.ascontiguousarray(logits), scale, seeds, positions, best, noised)
    return best, noised


def gumbel_topk(logits: Array, temperature: Array, seeds: Array, positions: Array, count: int) -> tuple[Array, Array]:
    """The `count` tokens with the largest logit plus noise, best first, and those sums: int64[n, count], float32[n, count].
    The first is `gumbel_argmax`'s.

    logits: float32[n, vocab_size], divided by the temperature already; temperature: float32[n], 0 = no noise; seeds and
    positions: int64[n].
    """
    best = np.empty((len(logits), count), dtype=np.int64)
    values = np.empty((len(logits), count), dtype=np.float32)
    loops.each_noised_top(np.ascontiguousarray(logits), temperature, seeds, positions, best, values)
    return best, values


def uniform_philox(seeds: Array, offsets: Array) -> Array:
    """float32[n] in (0, 1): Triton's `tl.rand` (Philox 4x32, 10 rounds) of int64 seeds and offsets, never 0."""
    key_low, key_high = _words(seeds)
    counter = [*_words(offsets), np.zeros(len(seeds), dtype=np.uint32), np.zeros(len(seeds), dtype=np.uint32)]
    for _ in range(10):
        first = counter[0].astype(np.uint64) * np.uint64(0xD2511F53)
        second = counter[2].astype(np.uint64) * np.uint64(0xCD9E8D57)
        counter = [
            (second >> np.uint64(32)).astype(np.uint32) ^ counter[1] ^ key_low,
            second.astype(np.uint32),
            (first >> np.uint64(32)).astype(np.uint32) ^ counter[3] ^ key_high,
            first.astype(np.uint32),
        ]
        key_low, key_high = key_low + _U32(0x9E3779B9), key_high + _U32(0xBB67AE85)
    signed = counter[0].view(np.int32)
    magnitude = np.where(signed < 0, -signed - 1, signed).astype(np.float32)
    uniform: Array = np.maximum(magnitude * np.float32(4.6566127342e-10), np.float32(4.6566127342e-10))
    return uniform


def _words(value: Array) -> tuple[Array, Array]:
    """Low and high 32-bit words of an int64 array."""
    bits = value.astype(np.int64).view(np.uint64)
    return (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)
