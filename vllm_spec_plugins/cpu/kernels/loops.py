# SPDX-License-Identifier: Apache-2.0
"""Drawing a token on the CPU, as compiled loops: Gumbel noise, the cut to top-k and top-p, rows drawn as a walk goes.

The noise is that of vLLM's sampler (vllm/v1/worker/gpu/sample/gumbel.py) bit for bit: a pure function of (seed, position,
token), a MurmurHash3 of the four 32-bit words, turned into a uniform number and that into Gumbel noise with the same
fp32 operations in the same order as the kernel.

numba widens a product or sum of two 32-bit numbers to 64 bits: every step of the hash is cut back to 32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled

_SECOND_WORD = np.uint32(0x9E3779B9)

_U32, _I32, _F32 = np.uint32, np.int32, np.float32
_C1, _C2, _ADD = _U32(0xCC9E2D51), _U32(0x1B873593), _U32(0xE6546B64)
_F1, _F2 = _U32(0x85EBCA6B), _U32(0xC2B2AE35)

# Bounds of the noise: it lies in (-2.82, 22.88) in float32, where the uniform number has 32 bits, and in
# (-3.63, 36.74) in float64, where it has 53.
_RANGE32, _RANGE64 = 25.7, 40.4
# _REACH[k]: noise above k needs a uniform number of at most this.
_REACH = np.exp(-np.arange(48.0))


@compiled
def _rotated(value: Any, shift: Any) -> Any:
    return _U32(_U32(value << _U32(shift)) | _U32(value >> _U32(32 - shift)))


@compiled
def _mixed(state: Any, word: Any) -> Any:
    """MurmurHash3's round: the state after one more 32-bit word."""
    scrambled = _U32(_rotated(_U32(_U32(word) * _C1), 15) * _C2)
    return _U32(_U32(_rotated(_U32(state ^ scrambled), 13) * _U32(5)) + _ADD)


@compiled
def hash_state(seed: Any, position: Any, domain: Any) -> Any:
    """uint32: the hash after seed and position (int64); `finished` adds the token."""
    state = _mixed(_U32(domain), _U32(seed & 0xFFFFFFFF))
    state = _mixed(state, _U32((seed >> 32) & 0xFFFFFFFF))
    return _mixed(state, _U32(position & 0xFFFFFFFF))


@compiled
def finished(state: Any, token: Any) -> Any:
    """uint32: the hash of a state and a token."""
    h = _U32(_mixed(state, _U32(token)) ^ _U32(16))
    h = _U32(_U32(h ^ (h >> _U32(16))) * _F1)
    h = _U32(_U32(h ^ (h >> _U32(13))) * _F2)
    return _U32(h ^ (h >> _U32(16)))


@compiled
def uniform32(random32: Any) -> Any:
    """float32 in (0, 1) from all 32 bits, correctly rounded: the halves convert exactly, their sum rounds once."""
    high = _F32(random32 >> _U32(16)) * _F32(1.52587890625e-05)
    low = (_F32(random32 & _U32(0xFFFF)) + _F32(0.5)) * _F32(2.3283064365386963e-10)
    return high + low


@compiled
def gumbel32(uniform: Any) -> Any:
    """-log(-log(1 - u)) in float32; the series below 1/4 keeps the precision of the tail that wins the argmax."""
    if uniform < _F32(0.25):
        polynomial = _F32(1.0 / 8.0)
        for order in range(7, 0, -1):
            polynomial = polynomial * uniform + _F32(1.0 / order)
        return -np.log(polynomial * uniform)
    return -np.log(-np.log(max(_F32(1.0) - uniform, _F32(5.960464477539063e-08))))


@compiled
def gumbel64(low: Any, high: Any) -> Any:
    """-log(-log(u)) in float64 from 53 bits of two hashes."""
    random53 = ((np.uint64(high) << np.uint64(32)) | np.uint64(low)) >> np.uint64(11)
    uniform = (np.float64(random53) + 0.5) * 1.1102230246251565e-16
    if uniform == 1.0:
        uniform -= 1.1102230246251565e-16
    return -np.log(-np.log(uniform))


@compiled
def largest_of(row: Any) -> Any:
    """The maximum of float32[n], NaNs left out; -inf if there is none. Sixteen at a time, which the machine can do."""
    lanes = np.full(16, -np.inf, dtype=np.float32)
    whole = len(row) - len(row) % 16
    for begin in range(0, whole, 16):
        for lane in range(16):
            value = row[begin + lane]
            lanes[lane] = value if value > lanes[lane] else lanes[lane]
    best = _F32(-np.inf)
    for value in lanes:
        best = max(best, value)
    for value in row[whole:]:
        best = value if value > best else best
    return best


@compiled
def noised_argmax(row: Any, scale: Any, seed: Any, position: Any) -> Any:
    """(token, maximum) of row / scale + noise for float32[n]; the first of equals, token 0 of a row of NaNs.

    Noise is made only for tokens that can win by any noise, and its logarithms only where the uniform number is small
    enough to lift the token over the best one so far.
    """
    state = hash_state(seed, position, 0)
    largest = largest_of(row)
    top = largest / scale
    slack = 1.01 + 4e-6 * abs(top)  # covers the rounding of the sums
    threshold = top - _F32(_RANGE32 + 0.2) - _F32(1e-6) * abs(top)
    best, noised = 0, _F32(-np.inf)
    for token in range(len(row)):
        score = row[token] / scale
        if score < threshold:
            continue
        uniform = uniform32(finished(state, token))
        ahead = noised - score
        if ahead > 0 and (ahead >= 48 or uniform > _REACH[int(ahead)] * slack):
            continue
        value = score + gumbel32(uniform)
        if value > noised:
            best, noised = token, value
    return best, noised


@compiled
def noised_argmax64(row: Any, scale: Any, seed: Any, position: Any) -> Any:
    """`noised_argmax` with noise of 53 bits and float64 sums."""
    low, high = hash_state(seed, position, 0), hash_state(seed, position, _SECOND_WORD)
    top = np.float64(largest_of(row) / scale)
    threshold = top - (_RANGE64 + 0.2) - 1e-6 * abs(top)
    best, noised = 0, -np.inf
    for token in range(len(row)):
        score = np.float64(row[token] / scale)
        if score < threshold:
            continue
        value = score + gumbel64(finished(low, token), finished(high, token))
        if value > noised:
            best, noised = token, value
    return best, noised


@compiled
def each_noised(logits: Any, temperature: Any, seeds: Any, positions: Any, best: Any, noised: Any) -> None:
    for i in range(len(logits)):
        best[i], noised[i] = noised_argmax(logits[i], temperature[i], seeds[i], positions[i])


@compiled
def noised_top(row: Any, noisy: Any, seed: Any, position: Any, best: Any, values: Any) -> None:
    """The len(best) tokens of float32[n] with the largest row + noise, the first of equals first, into int64 best; the sums
    into float32 values.

    As in `noised_argmax`, noise is made only where it can lift a token over the last of the best so far.
    """
    state = hash_state(seed, position, 0)
    count, found = len(best), 0
    values[:] = -np.inf
    slack = 1.01 + 4e-6 * abs(largest_of(row))
    for token in range(len(row)):
        value, last = row[token], values[count - 1]
        if noisy:
            ahead = last - value
            if found == count and ahead > _RANGE32:
                continue
            uniform = uniform32(finished(state, token))
            if found == count and ahead > 0 and uniform > _REACH[int(ahead)] * slack:
                continue
            value = value + gumbel32(uniform)
        if found == count and not value > last:
            continue
        place = found if found < count else count - 1
        while place > 0 and values[place - 1] < value:
            values[place], best[place] = values[place - 1], best[place - 1]
            place -= 1
        values[place], best[place] = value, token
        found = min(found + 1, count)


@compiled
def each_noised_top(logits: Any, temperature: Any, seeds: Any, positions: Any, best: Any, values: Any) -> None:
    for i in range(len(logits)):
        noised_top(logits[i], temperature[i] > 0, seeds[i], positions[i], best[i], values[i])


@compiled
def each_noised64(logits: Any, temperature: Any, seeds: Any, positions: Any, best: Any, noised: Any) -> None:
    for i in range(len(logits)):
        best[i], noised[i] = noised_argmax64(logits[i], temperature[i], seeds[i], positions[i])


@compiled
def cut_each(logits: Any, k: Any, p: Any) -> None:
    scratch = np.empty((2, logits.shape[1]), dtype=np.float32)
    for i in range(len(logits)):
        cut(logits[i], k, p, i, scratch)


@compiled
def cut(row: Any, k: Any, p: Any, i: Any, scratch: Any) -> None:
    """Top-k and top-p of one row, in place: k[i] and p[i] unless the array is empty. scratch: float32[2, n]."""
    if len(k):
        keep_largest(row, k[i])
    if len(p):
        keep_nucleus(row, p[i], scratch[0], scratch[1])


@compiled
def keep_largest(row: Any, k: Any) -> None:
    """Mask what is smaller than the k-th largest of float32[n]."""
    if k >= len(row):
        return
    bits = row.view(np.int32)
    # Sign and 11 bits of a float32, in the order of the numbers; of NaNs nothing is known.
    count = np.zeros(4096, dtype=np.int64)
    for token in range(len(row)):
        count[_bucket_of(bits[token])] += 1
    bucket, above = 4095, 0
    while above + count[bucket] < k:
        above += count[bucket]
        bucket -= 1
    near, size = np.empty(count[bucket], dtype=np.float32), 0
    for token in range(len(row)):
        if _bucket_of(bits[token]) == bucket:
            near[size] = row[token]
            size += 1
    edge = np.sort(near)[above + size - k]
    for token in range(len(row)):
        if row[token] < edge:
            row[token] = -np.inf


@compiled
def _bucket_of(bits: Any) -> Any:
    return (bits >> 20) + 2048 if bits >= 0 else 2047 - ((bits & 0x7FFFFFFF) >> 20)


@compiled
def _exponentials(row: Any, top: Any, out: Any, power: Any) -> None:
    """out = exp(row - top) for float32[n] with row <= top, 0 below exp(-87); `power` [n] is scratch.

    2^k * p(r) after Cephes' expf, within 2e-6: loops that the compiler vectorises (5 us for 4096 logits, libm's take 50).
    """
    bits = power.view(np.int32)
    for i in range(len(row)):
        x = max(row[i] - top, _F32(-87.0))
        k = x * _F32(1.44269504) + _F32(12582912.0) - _F32(12582912.0)  # the nearest integer to x / log(2)
        r = x - k * _F32(0.693359375) - k * _F32(-2.12194440e-4)
        p = _F32(1.9875691500e-4)
        p = p * r + _F32(1.3981999507e-3)
        p = p * r + _F32(8.3334519073e-3)
        p = p * r + _F32(4.1665795894e-2)
        p = p * r + _F32(1.6666665459e-1)
        p = p * r + _F32(5.0000001201e-1)
        out[i] = p * (r * r) + r + _F32(1.0)
        bits[i] = (_I32(k) + _I32(127)) << _I32(23)
    for i in range(len(row)):
        out[i] = out[i] * power[i] if row[i] - top > _F32(-87.0) else _F32(0.0)


@compiled
def keep_nucleus(row: Any, p: Any, weights: Any, scratch: Any) -> None:
    """Mask the least probable of float32[n] as long as their mass is at most 1 - p, but never the largest.

    1 - p is rounded to float32, as in vLLM: it is part of the definition of the cut.
    """
    top = largest_of(row)
    if not np.isfinite(top):
        return
    _exponentials(row, top, weights, scratch)
    # Mass by size of the weights, 16 sizes to the octave: the cut falls into one of them, and only that is sorted.
    bits = weights.view(np.int32)
    mass = np.zeros(2048)
    for token in range(len(row)):
        mass[bits[token] >> 19] += weights[token]
    budget = (_F32(1.0) - p) * mass.sum()
    bucket, outside = 0, 0.0
    while bucket < (0x3F800000 >> 19) and outside + mass[bucket] <= budget:
        outside += mass[bucket]
        bucket += 1
    near = 0
    for token in range(len(row)):
        if bits[token] >> 19 == bucket:
            scratch[near] = weights[token]
            near += 1
    ordered = np.sort(scratch[:near])
    last, outside = 0, outside + ordered[0]
    while outside <= budget and last < near - 1:
        last += 1
        outside += ordered[last]
    edge = ordered[last]
    equals = last - np.searchsorted(ordered, edge)  # of the tokens at the edge, how many are outside
    for token in range(len(row)):
        if weights[token] < edge:
            row[token] = -np.inf
        elif equals and weights[token] == edge:
            row[token] = -np.inf
            equals -= 1


@compiled
def draw_reached(
    logits: Any,
    tokens: Any,
    parents: Any,
    counts: Any,
    temperature: Any,
    seeds: Any,
    positions: Any,
    k: Any,
    p: Any,
) -> Any:
    """Draws at the rows that the walk reaches, and at no other: [B, N + 1] int64, -1 where nothing was drawn.

    Args:
        logits: float32[L, V], request by request; the temperature is applied already. Rows reached are masked by top-k
            and top-p in place.
        tokens, parents: [B, N] trees; counts: [B], their nodes that have a row.
        temperature: float32[B], 0 = greedy; seeds: int64[B].
        positions: int64[L], the key of each row's noise.
        k, p: int32[L] and float32[L], or empty.
    """
    batch, nodes = tokens.shape
    drawn = np.full((batch, nodes + 1), -1, dtype=np.int64)
    scratch = np.empty((2, logits.shape[1]), dtype=np.float32)
    line = 0
    for b in range(batch):
        for row in range(counts[b] + 1):
            reached = row == 0
            if not reached:
                parent, token = parents[b, row - 1], tokens[b, row - 1]
                reached = token >= 0 and drawn[b, parent] == token
            if reached:
                cut(logits[line], k, p, line, scratch)
                if temperature[b] == 0:
                    drawn[b, row] = np.argmax(logits[line])
                else:
                    drawn[b, row] = noised_argmax(logits[line], _F32(1.0), seeds[b], positions[line])[0]
            line += 1
    return drawn


def warm() -> None:
    """Compile what serving will call, with the types that it will call it with."""
    logits, keep, mass = np.zeros((1, 16), np.float32), np.ones(1, np.int32), np.ones(1, np.float32)
    number, none = np.zeros(1, np.int64), np.full((1, 1), -1, np.int64)
    cut_each(logits, keep, mass)
    each_noised(logits, mass, number, number, np.zeros(1, np.int64), np.zeros(1, np.float32))
    each_noised_top(logits, mass, number, number, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
    draw_reached(logits, none, np.zeros((1, 1), np.int64), number, mass, number, number, keep, mass)
