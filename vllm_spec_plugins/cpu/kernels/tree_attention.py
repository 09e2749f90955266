# SPDX-License-Identifier: Apache-2.0
"""Attention of tree rows over the paged K/V cache, as compiled loops in float32.

A tree row sees every token before its root and those columns of its tree that its mask names. Keys and values of both are
read from the cache, block by block, for all rows of a request and all heads of a K/V head together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled

# 2^f for f in [-1/2, 1/2], the Taylor series: relative error below 1e-7.
_C1, _C2, _C3 = np.float32(0.6931471806), np.float32(0.2402265070), np.float32(0.0555041087)
_C4, _C5, _C6 = np.float32(0.0096181291), np.float32(0.0013333558), np.float32(0.0001540353)
_LOG2E, _ROUND, _LEAST = np.float32(1.4426950409), np.float32(12582912.0), np.float32(-80.0)
_ONE, _ZERO, _MASKED = np.float32(1.0), np.float32(0.0), np.float32(-np.inf)
_LANES = 16


@compiled
def attend(
    query: Any,
    cache: Any,
    table: Any,
    request: Any,
    prefix: Any,
    behind: Any,
    sees: Any,
    depth: Any,
    window: int,
    scale: Any,
    soft_cap: Any,
    out: Any,
) -> None:
    """Attention of R rows, into `out` [R, H, D].

    Args:
        query: float32[R, H, D]; rows of one request stand together.
        cache: float32[blocks, G, 2, P * D]: keys [D, P] (each block transposed), then values [P, D].
        table: int32[T, M], blocks of each request.
        request: int64[R], which of the T requests a row belongs to.
        prefix: int64[T], tokens that every row of the request sees: the first ones of the cache.
        behind: int64[T], tokens of the tree that stand behind them.
        sees: bool[R, S], which of the latter a row sees: at least itself.
        depth: int64[R], depth of each row; of no tokens without a window.
        window: a row sees only the last `window` tokens, itself included; 0 = all. Its tree is always inside.
        scale, soft_cap: float32; soft_cap 0 = none.
    """
    rows, heads, dim = query.shape
    groups, size = cache.shape[1], cache.shape[3] // dim
    per_group = heads // groups
    longest = 0
    for row in range(rows):
        longest = max(longest, prefix[request[row]] + behind[request[row]])
    width = (longest + _LANES - 1) // _LANES * _LANES
    scores = np.empty((rows * per_group, width), dtype=np.float32)  # of one request and K/V head
    powers, lanes = np.empty(width, dtype=np.float32), np.empty(_LANES, dtype=np.float32)
    first = 0
    while first < rows:
        last = first
        while last < rows and request[last] == request[first]:
            last += 1
        of = request[first]
        before, columns = prefix[of], behind[of]
        # What no row sees is not read: blocks in front of a window may be others' by now.
        skipped = max(0, before - window + 1) // size if window > 0 else 0
        before -= skipped * size
        length = before + columns
        blocks = (length + size - 1) // size
        for group in range(groups):
            for block in range(blocks):
                start = block * size
                count = min(size, length - start)
                keys = cache[table[of, skipped + block], group, 0]
                for row in range(first, last):
                    for head in range(per_group):
                        line = scores[(row - first) * per_group + head, start : start + count]
                        _dot(query[row, group * per_group + head], keys, size, scale, line)
            for row in range(first, last):
                for head in range(per_group):
                    line = scores[(row - first) * per_group + head]
                    if soft_cap > _ZERO:
                        for place in range(length):
                            line[place] = soft_cap * np.float32(np.tanh(line[place] / soft_cap))
                    if window > 0:
                        line[: max(0, before + depth[row] - window + 1)] = _MASKED
                    for place in range(columns):
                        if not sees[row, place]:
                            line[before + place] = _MASKED
                    line[length:] = _MASKED
                    whole = (length + _LANES - 1) // _LANES * _LANES
                    total = _softmax(line[:whole], powers[:whole], lanes)
                    to = out[row, group * per_group + head]
                    to[:] = _ZERO
                    for block in range(blocks):
                        start = block * size
                        count = min(size, length - start)
                        _weigh(line[start : start + count], cache[table[of, skipped + block], group, 1], to)
                    for place in range(dim):
                        to[place] /= total
        first = last


@compiled
def _dot(query: Any, keys: Any, size: int, scale: Any, out: Any) -> None:
    """out[p] = scale * sum over d of query[d] * keys[d * size + p]; d in fours."""
    count = len(out)
    out[:] = _ZERO
    for place in range(0, len(query), 4):
        a, b = query[place] * scale, query[place + 1] * scale
        c, d = query[place + 2] * scale, query[place + 3] * scale
        k, m = keys[place * size : place * size + count], keys[(place + 1) * size : (place + 1) * size + count]
        n = keys[(place + 2) * size : (place + 2) * size + count]
        o = keys[(place + 3) * size : (place + 3) * size + count]
        for p in range(count):
            out[p] += a * k[p] + b * m[p] + c * n[p] + d * o[p]


@compiled
def _softmax(line: Any, powers: Any, lanes: Any) -> Any:
    """exp(line - its maximum) in place; returns the sum.

    The length is a multiple of the lanes; `powers` is scratch of that length. Loops are written so that they become vector
    instructions: sums and maxima in lanes, 2^n made of the bits of n.
    """
    count = len(line)
    lanes[:] = _MASKED
    for start in range(0, count, _LANES):
        for lane in range(_LANES):
            value = line[start + lane]
            lanes[lane] = value if value > lanes[lane] else lanes[lane]
    most = _MASKED
    for lane in range(_LANES):
        most = lanes[lane] if lanes[lane] > most else most
    for place in range(count):
        power = (line[place] - most) * _LOG2E
        power = power if power > _LEAST else _LEAST
        rounded = power + _ROUND  # the nearest whole number stands in the low bits
        powers[place] = rounded
        f = power - (rounded - _ROUND)
        line[place] = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    bits = powers.view(np.int32)
    for place in range(count):
        bits[place] = (bits[place] + 127) << 23
    lanes[:] = _ZERO
    for start in range(0, count, _LANES):
        for lane in range(_LANES):
            value = line[start + lane] * powers[start + lane]
            line[start + lane] = value
            lanes[lane] += value
    total = _ZERO
    for lane in range(_LANES):
        total += lanes[lane]
    return total


@compiled
def _weigh(weights: Any, values: Any, out: Any) -> None:
    """out += weights @ values [len(weights), len(out)]; rows of values in fours."""
    dim, count = len(out), len(weights)
    whole = count // 4 * 4
    for place in range(0, whole, 4):
        a, b, c, d = weights[place], weights[place + 1], weights[place + 2], weights[place + 3]
        start = place * dim
        k, m = values[start : start + dim], values[start + dim : start + 2 * dim]
        n, o = values[start + 2 * dim : start + 3 * dim], values[start + 3 * dim : start + 4 * dim]
        for p in range(dim):
            out[p] += a * k[p] + b * m[p] + c * n[p] + d * o[p]
    for place in range(whole, count):
        a = weights[place]
        k = values[place * dim : (place + 1) * dim]
        for p in range(dim):
            out[p] += a * k[p]
