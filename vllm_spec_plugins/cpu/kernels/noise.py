# SPDX-License-Identifier: Apache-2.0
"""The Gumbel noise of vLLM's sampler (vllm/v1/worker/gpu/sample/gumbel.py), bit for bit.

Noise is a pure function of (seed, position, token): a MurmurHash3 of the four 32-bit words, turned into a uniform
number and that into Gumbel noise with the same fp32 operations in the same order as the kernel.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vllm_spec_plugins.cpu.kernels.views import Array

# Drafts draw from a stream of their own: vLLM's ratio test needs noise that is independent of the target's.
DRAFT_SALT = 1 << 30
_SECOND_WORD = 0x9E3779B9

_U32 = np.uint32
_C1, _C2, _ADD = _U32(0xCC9E2D51), _U32(0x1B873593), _U32(0xE6546B64)
_F1, _F2 = _U32(0x85EBCA6B), _U32(0xC2B2AE35)


def _rotate(value: Array, shift: int) -> Array:
    return (value << _U32(shift)) | (value >> _U32(32 - shift))


def _scramble(key: Array) -> Array:
    return _rotate(key * _C1, 15) * _C2


def _mix(state: Array, scrambled: Array) -> Array:
    state = _rotate(state ^ scrambled, 13)
    return state * _U32(5) + _ADD


@lru_cache(maxsize=4)
def _scrambled_tokens(vocab_size: int) -> Array:
    """uint32[vocab_size]: the token's word of the hash, the same for every seed and position."""
    return _scramble(np.arange(vocab_size, dtype=np.uint32))


def _words(value: Array) -> tuple[Array, Array]:
    """Low and high 32-bit words of an int64 array."""
    bits = value.astype(np.int64).view(np.uint64)
    return (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=8192)
def _seed_state(seed: int, domain: int) -> int:
    """The hash after the seed's two words: all that a request's rows share."""
    state = np.array([domain], dtype=np.uint32)
    for word in _words(np.array([seed])):
        state = _mix(state, _scramble(word))
    return int(state[0])


def hash_states(seeds: Array, positions: Array, domain: int = 0) -> Array:
    """uint32[n]: the hash after seed and position, int64[n] each; `finish` adds the token."""
    state = np.array([_seed_state(seed, domain) for seed in seeds.tolist()], dtype=np.uint32)
    return _mix(state, _scramble(positions.astype(np.uint32)))


def finish(states: Array, scrambled: Array) -> Array:
    """uint32 hash of states and the tokens' scrambled words, broadcast against each other."""
    h = _mix(states, scrambled)
    h ^= _U32(16)
    h ^= h >> _U32(16)
    h *= _F1
    h ^= h >> _U32(13)
    h *= _F2
    h ^= h >> _U32(16)
    return h


def uniform32(random32: Array) -> Array:
    """float32 in (0, 1) from all 32 bits, correctly rounded: the halves convert exactly, their sum rounds once."""
    high = (random32 >> _U32(16)).astype(np.float32)
    low = (random32 & _U32(0xFFFF)).astype(np.float32)
    high *= np.float32(1.52587890625e-05)
    low += np.float32(0.5)
    low *= np.float32(2.3283064365386963e-10)
    high += low
    return high


def gumbel32(uniform: Array) -> Array:
    """-log(-log(1 - u)) in float32; the series below 1/4 keeps the precision of the tail that wins the argmax."""
    polynomial = np.full_like(uniform, 1.0 / 8.0)
    for order in (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        polynomial *= uniform
        polynomial += np.float32(1.0 / order)
    polynomial *= uniform  # -log(1 - u), by its series
    direct = np.log(np.maximum(np.float32(1.0) - uniform, np.float32(5.960464477539063e-08)))
    np.negative(direct, out=direct)
    noise = np.log(np.where(uniform < np.float32(0.25), polynomial, direct))
    return np.negative(noise, out=noise)


def gumbel64(low: Array, high: Array) -> Array:
    """-log(-log(u)) in float64 from 53 bits of two hashes."""
    random53 = ((high.astype(np.uint64) << np.uint64(32)) | low) >> np.uint64(11)
    uniform = (random53.astype(np.float64) + 0.5) * 1.1102230246251565e-16
    uniform = np.where(uniform == 1.0, uniform - 1.1102230246251565e-16, uniform)
    noise: Array = -np.log(-np.log(uniform))
    return noise


# Bounds of the difference between two draws of noise: the noise lies in (-2.82, 22.88) in float32, where the uniform
# number has 32 bits, and in (-3.63, 36.74) in float64, where it has 53.
_RANGE32, _RANGE64 = 25.7, 40.4


def gumbel_argmax(
    logits: Array, temperature: Array | None, seeds: Array, positions: Array, drafting: bool, fp64: bool
) -> tuple[Array, Array]:
    """Token that maximises logits / temperature + noise, and the maximum: int64[n], float32[n] (float64[n]).

    logits: float32[n, vocab_size]; temperature: float32[n], or None when it is applied already; seeds and positions:
    int64[n]. Noise is drawn only for tokens that could win: those that no noise could lift to the best one are left out.
    """
    scores = logits if temperature is None else logits / temperature[:, None]
    scores = scores.astype(np.float64) if fp64 else scores
    largest = scores.max(axis=1)
    # The margin covers the rounding of the sums.
    threshold = largest - (_RANGE64 if fp64 else _RANGE32) - 0.2 - 1e-6 * np.abs(largest)
    with np.errstate(invalid="ignore"):
        row, token = np.nonzero(~(scores < threshold[:, None]))
    if drafting:
        positions = positions + DRAFT_SALT
    scrambled = _scrambled_tokens(logits.shape[1])[token]
    low = finish(hash_states(seeds, positions)[row], scrambled)
    if fp64:
        noise = gumbel64(low, finish(hash_states(seeds, positions, _SECOND_WORD)[row], scrambled))
    else:
        noise = gumbel32(uniform32(low))
    noised = scores[row, token]
    noised += noise
    first = np.searchsorted(row, np.arange(len(scores)))
    largest = np.fmax.reduceat(noised, first)
    # Of equals the first one wins: it is written last.
    winners = np.flatnonzero(noised == largest[row])[::-1]
    best = np.zeros(len(scores), dtype=np.int64)  # what a row of NaNs gets
    best[row[winners]] = token[winners]
    return best, largest


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
