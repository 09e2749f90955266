# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Attention of the rows of token trees over vLLM's paged K/V cache.

A row sees the prefix (everything before its tree's root) and those tokens of its tree that its bits name: its ancestors
and itself, as SpecInfer's tree attention has it (arXiv 2305.09781, section 4.2). All of them stand in the cache when
attention runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


# Memory traffic: every request's keys and values once per K/V head, 2 * (prefix + behind) * G * D elements, and its
# queries and outputs, 2 * rows * H * D. This reference reads keys and values once per query head and writes the scores.
def reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    *,
    start: Tensor,
    prefix: Tensor,
    behind: Tensor,
    words: Tensor,
    block_table: Tensor,
    max_rows: int,
    scale: float,
    soft_cap: float = 0.0,
    window: int = 0,
    depth: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    splits: int | None = None,
    scratch: Scratch | None = None,
) -> None:
    """What `tree_attention` computes, in float32, request by request; `max_rows`, `splits` and `scratch` change nothing."""
    heads, (_, size, groups, _) = query.shape[1], key_cache.shape
    bits = (words.unsqueeze(2) >> torch.arange(64, device=words.device)).bitwise_and(1).bool().flatten(1)
    for request, (first, last) in enumerate(zip(start[:-1].tolist(), start[1:].tolist(), strict=True)):
        if first == last:
            continue
        before, tree = int(prefix[request]), int(behind[request])
        low = max(0, before - window + 1) if window else 0
        position = torch.arange(low, before + tree, device=query.device)
        block, slot = block_table[request, position // size].long(), position % size
        key, value = key_cache[block, slot].float(), value_cache[block, slot].float()  # [tokens, G, D]
        key = key * k_scale if k_scale is not None else key
        value = value * v_scale if v_scale is not None else value
        key, value = key.repeat_interleave(heads // groups, 1), value.repeat_interleave(heads // groups, 1)
        score = torch.einsum("rhd,thd->rht", query[first:last].float(), key) * scale
        score = torch.tanh(score / soft_cap) * soft_cap if soft_cap else score
        sees = torch.cat([bits.new_ones(last - first, before - low), bits[first:last, :tree]], 1)
        if window:
            assert depth is not None
            sees &= position > before + depth[first:last].unsqueeze(1) - window
        weight = score.masked_fill(~sees.unsqueeze(1), float("-inf")).softmax(2)
        out[first:last] = torch.einsum("rht,thd->rhd", weight, value).to(out.dtype)


@triton.jit
def _load_rows(pointers, d, exists, DIM: tl.constexpr, PADDED: tl.constexpr, PARTIAL: tl.constexpr):
    """[tokens, PADDED] keys or values; zeros behind DIM and, if PARTIAL, for tokens that do not exist."""
    if PARTIAL:
        return tl.load(pointers + d[None, :], mask=exists[:, None] & (d < DIM)[None, :], other=0.0)
    if DIM < PADDED:
        return tl.load(pointers + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    return tl.load(pointers + d[None, :])


@triton.jit
def _tile_bits(words_ptr, real, offset, WORDS: tl.constexpr):
    """[rows] uint64: bit c tells whether a row sees tree token `offset` + c; those at -64..-1 are the prefix: seen.

    Bits of at most 64 tokens lie in two neighbouring words, whatever the offset.
    """
    word = (offset + 64) // 64 - 1
    shift = (offset + 64 - (word + 1) * 64).to(tl.uint64)
    at = tl.where(real, word, -2)
    low = tl.load(words_ptr + at, mask=(at >= 0) & (at < WORDS), other=0)
    high = tl.load(words_ptr + at + 1, mask=(at >= -1) & (at < WORDS - 1), other=0)
    low = tl.where(at == -1, -1, low).to(tl.uint64, bitcast=True)
    # Two shifts: by 64 at once means nothing.
    return (low >> shift) | ((high.to(tl.uint64, bitcast=True) << (63 - shift)) << 1)


@triton.jit
def _attend_tile(
    index, acc, total, peak, query,
    key_ptr, value_ptr, table_ptr, words_ptr,
    real, low, prefix, length, beyond, unit, factor,
    key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WORDS: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the tokens of tile `index`. TREE: the tile ends behind the prefix."""
    position = index * BLOCK_N + tl.arange(0, BLOCK_N)
    PARTIAL: tl.constexpr = TREE or WINDOW
    exists = position >= low
    if TREE:
        exists &= position < length
    if PARTIAL:
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    else:
        block = tl.load(table_ptr + position // BLOCK_SIZE).to(tl.int64)
    slot = position % BLOCK_SIZE
    d = tl.arange(0, PADDED)
    keys = key_ptr + (block * key_block_stride + slot * key_slot_stride)[:, None]
    values = value_ptr + (block * value_block_stride + slot * value_slot_stride)[:, None]
    key = _load_rows(keys, d, exists, DIM, PADDED, PARTIAL).to(query.dtype)
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SOFT_CAP:  # tanh(x) = 1 - 2 / (1 + e^2x), which overflows to the right limits
        score = 1.0 - 2.0 / (1.0 + tl.exp2(score * factor))
    if WINDOW:
        score = tl.where(exists[None, :] & (position[None, :] > beyond[:, None]), score, float("-inf"))
    if TREE:
        bits = _tile_bits(words_ptr, real, index * BLOCK_N - prefix, WORDS)
        column = tl.arange(0, BLOCK_N).to(tl.uint64)
        sees = ((bits[:, None] >> column[None, :]) & 1) != 0
        score = tl.where(sees & exists[None, :], score, float("-inf"))
    # `peak` starts finite: where nothing has been seen yet, exp2(-inf - peak) is 0, not NaN.
    higher = tl.maximum(peak, tl.max(score, 1) * unit)
    weight = tl.exp2(score * unit - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(weight, 1)
    value = _load_rows(values, d, exists, DIM, PADDED, PARTIAL).to(query.dtype)
    acc = tl.dot(weight.to(query.dtype), value, acc * fade[:, None], input_precision="ieee")
    return acc, total, higher


# How many parts and requests there are goes with the batch.
@triton.jit(do_not_specialize=["splits"])
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, partial_ptr, peak_ptr, total_ptr,
    start_ptr, prefix_ptr, behind_ptr, words_ptr, depth_ptr, table_ptr, k_scale_ptr, v_scale_ptr,
    scale, soft_cap, splits, table_stride,
    query_row_stride: tl.constexpr, query_head_stride: tl.constexpr,
    out_row_stride: tl.constexpr, out_head_stride: tl.constexpr,
    key_block_stride: tl.constexpr, key_slot_stride: tl.constexpr, key_head_stride: tl.constexpr,
    value_block_stride: tl.constexpr, value_slot_stride: tl.constexpr, value_head_stride: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    WORDS: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (splits * tiles of rows, G, B). A tile is BLOCK_M (row, head) pairs of one request and K/V head."""
    # Tiles that read the same keys and values are neighbours: the second finds them in L2.
    tiles = tl.num_programs(0) // splits
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    group, request = tl.program_id(1), tl.program_id(2)
    first = tl.load(start_ptr + request)
    rows = tl.load(start_ptr + request + 1) - first
    if tile * BLOCK_M >= rows * PER_GROUP:
        return
    prefix = tl.load(prefix_ptr + request)
    length = prefix + tl.load(behind_ptr + request)

    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = pair < rows * PER_GROUP
    row = (first + pair // PER_GROUP).to(tl.int64)
    head = group * PER_GROUP + pair % PER_GROUP
    d = tl.arange(0, PADDED)
    there = real[:, None] & (d < DIM)[None, :]
    queries = query_ptr + (row * query_row_stride + head * query_head_stride)[:, None] + d[None, :]
    query = tl.load(queries, mask=there, other=0.0)

    # The scores, times `unit`, are exponents of 2: scale and log2(e) cost nothing in the loop.
    LOG2E: tl.constexpr = 1.4426950408889634
    if SCALED:
        scale *= tl.load(k_scale_ptr)
    unit = scale * LOG2E
    factor = unit
    if SOFT_CAP:
        factor = 2.0 * unit / soft_cap
        unit = soft_cap * LOG2E
    # The first token that any row sees, and for each row the last one that it does not see any more.
    low, beyond = 0, 0
    if WINDOW:
        low = tl.maximum(prefix - WINDOW + 1, 0)
        beyond = prefix - WINDOW + tl.load(depth_ptr + row, mask=real, other=0)

    begin, end = low // BLOCK_N, tl.cdiv(length, BLOCK_N)
    share = tl.cdiv(end - begin, splits)
    begin += split * share
    end = tl.minimum(end, begin + share)
    whole = tl.minimum(tl.maximum(begin, prefix // BLOCK_N), end)

    key_ptr += group.to(tl.int64) * key_head_stride
    value_ptr += group.to(tl.int64) * value_head_stride
    table_ptr += request.to(tl.int64) * table_stride
    words_ptr += row * WORDS
    acc = tl.zeros([BLOCK_M, PADDED], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    for index in range(begin, whole):
        acc, total, peak = _attend_tile(
            index, acc, total, peak, query, key_ptr, value_ptr, table_ptr, words_ptr,
            real, low, prefix, length, beyond, unit, factor,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
            BLOCK_SIZE, DIM, PADDED, WORDS, SOFT_CAP, WINDOW > 0, BLOCK_N, False,
        )  # fmt: skip
    for index in range(whole, end):
        acc, total, peak = _attend_tile(
            index, acc, total, peak, query, key_ptr, value_ptr, table_ptr, words_ptr,
            real, low, prefix, length, beyond, unit, factor,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
            BLOCK_SIZE, DIM, PADDED, WORDS, SOFT_CAP, WINDOW > 0, BLOCK_N, True,
        )  # fmt: skip

    if SCALED:
        acc *= tl.load(v_scale_ptr)
    if SPLIT:
        place = (row * HEADS + head) * splits + split
        tl.store(peak_ptr + place, peak, mask=real)
        tl.store(total_ptr + place, total, mask=real)
        if begin < end:  # what an empty part would write is not read
            tl.store(partial_ptr + place[:, None] * DIM + d[None, :], acc, mask=there)
    else:
        outs = out_ptr + (row * out_row_stride + head * out_head_stride)[:, None] + d[None, :]
        tl.store(outs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["requests"])
def merge_kernel(
    partial_ptr, peak_ptr, total_ptr, out_ptr, start_ptr, requests,
    out_row_stride: tl.constexpr, out_head_stride: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: BLOCK of the (row, head) pairs each. out = sum of weight * partial, weight = 2^(peak - the highest)."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, head = pair // HEADS, pair % HEADS
    real = (row >= tl.load(start_ptr)) & (row < tl.load(start_ptr + requests))
    highest = tl.full([BLOCK], -1.0e30, dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(peak_ptr + pair * SPLITS + split, mask=real, other=-1.0e30))
    d = tl.arange(0, PADDED)
    there = real[:, None] & (d < DIM)[None, :]
    acc, whole = tl.zeros([BLOCK, PADDED], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        place = pair * SPLITS + split
        total = tl.load(total_ptr + place, mask=real, other=0.0)
        weight = tl.exp2(tl.load(peak_ptr + place, mask=real, other=-1.0e30) - highest)
        seen = there & (total > 0)[:, None]
        acc += weight[:, None] * tl.load(partial_ptr + place[:, None] * DIM + d[None, :], mask=seen, other=0.0)
        whole += weight * total
    outs = out_ptr + (row * out_row_stride + head * out_head_stride)[:, None] + d[None, :]
    tl.store(outs, (acc / whole[:, None]).to(out_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Tile:
    """How a launch is cut: programs of `pairs` (row, head) pairs that take `tokens` of the context at a time.

    `warps` and `stages` are the compiler's; `per_sm` programs fit a multiprocessor of an H100 or H200 side by side.
    """

    pairs: int
    tokens: int
    warps: int
    stages: int
    per_sm: int


# By bytes of a query's element and padded head size, ascending. Chosen from what the compiler says (Triton 3.9: registers,
# KiB of shared memory on 9.0 | 8.0; no spills, but for 8 bytes with an 8-bit cache on 8.0), speed is to be measured.
# A byte of 16-bit keys and values costs `pairs` operations, and an H200 does about 190 while it moves one (790 TFLOP/s,
# 4.3 TB/s). Below that programs side by side and five stages, which keep two tiles under way (block numbers take a stage of
# their own), are there to hide memory's latency; above it tensor cores are the limit, whatever is done for memory.
_TILES = {
    (2, 64): (
        Tile(16, 64, 4, 5, 4),  # 122, 38 | 96, 37
        Tile(32, 64, 4, 5, 3),  # 156, 42 | 154, 42
        Tile(64, 64, 4, 5, 3),  # 156, 60 | 200, 42
        Tile(128, 64, 8, 5, 1),  # 180, 70 | 194, 52
    ),
    (2, 128): (
        Tile(16, 64, 4, 5, 3),  # 162, 72 | 168, 71
        Tile(32, 64, 4, 5, 2),  # 202, 78 | 204, 78
        Tile(64, 32, 8, 5, 2),  # 118, 66 | 178, 54
        Tile(128, 32, 8, 5, 1),  # 184, 84 | 186, 68
    ),
    (2, 256): (
        Tile(16, 32, 4, 5, 2),  # 194, 75 | 168, 74
        Tile(32, 32, 8, 5, 1),  # 160, 84 | 162, 83
        Tile(64, 32, 8, 3, 1),  # 188, 98 | 188, 69
    ),
    # Exact products of float32 know no tensor cores.
    (4, 64): (Tile(16, 32, 8, 3, 3),),  # 70, 23 | 68, 22
    (4, 128): (Tile(16, 32, 8, 3, 3),),  # 80, 43 | 64, 42
    (4, 256): (Tile(16, 32, 8, 3, 2),),  # 120, 83 | 124, 82
}
# On 9.0 alone, which has the registers and the shared memory for wider steps of its asynchronous products.
_TILES_90 = {
    (2, 128, 64): Tile(64, 64, 4, 3, 2),  # 240, 83
    (2, 128, 128): Tile(128, 64, 8, 5, 1),  # 218, 133
}


def tile_for(dtype: torch.dtype, dim: int, pairs: int, capability: int = 90) -> Tile:
    """For requests of up to `pairs` pairs for each K/V head: the smallest tile that holds all of them.

    Else the largest, so that keys and values are fetched few times; or the next, if more than a third would be padding.
    """
    size = max(triton.next_power_of_2(dim), 64)
    tiles = _TILES[dtype.itemsize, size]
    tile = next((tile for tile in tiles if tile.pairs >= pairs), tiles[-1])
    if 2 * tile.pairs * triton.cdiv(pairs, tile.pairs) > 3 * pairs > 3 * tile.pairs:
        tile = tiles[max(len(tiles) - 2, 0)]
    return _TILES_90.get((dtype.itemsize, size, tile.pairs), tile) if capability == 90 else tile


# The merge grows with the number of parts. To be measured.
MOST_SPLITS = 32


def choose_splits(tile: Tile, pairs: int, batch: int, groups: int, bound: int, multiprocessors: int) -> int:
    """In how many parts to compute a context of at most `bound` tokens: a power of 2, so that few merges are compiled.

    As many as the machine runs at once, but none of less than two steps; one where the requests fill it by themselves.
    """
    programs = batch * groups * triton.cdiv(pairs, tile.pairs)
    splits = min(multiprocessors * tile.per_sm // programs, bound // (2 * tile.tokens), MOST_SPLITS)
    return 1 << max(splits, 1).bit_length() - 1


@lru_cache(maxsize=16)
def _machine(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 is 9.0) and number of multiprocessors; the interpreter passes for an H200 with one of them."""
    if device.type != "cuda":
        return 90, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@dataclass(frozen=True, eq=False)
class Scratch:
    """Where the parts of a context leave what they found, for `merge_kernel`. Any shape that holds as many elements.

    Attributes:
        partial: [rows, H, splits, D] float32, sums of weighted values.
        peak: [rows, H, splits] float32, the highest score, as an exponent of 2.
        total: [rows, H, splits] float32, sums of the weights; 0 where a row saw nothing.
    """

    partial: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def empty(cls, rows: int, heads: int, splits: int, dim: int, device: torch.device | str) -> Scratch:
        peak, total = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=device)
        return cls(torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=device), peak, total)


def traffic(
    tokens: int,
    rows: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that must move: keys and values of `tokens` (of all requests, inside their window) once per K/V head, and
    queries and outputs of `rows` (of all requests)."""
    cached = (cache_dtype or dtype).itemsize
    return 2 * tokens * groups * dim * cached + 2 * rows * heads * dim * dtype.itemsize


_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    *,
    start: Tensor,
    prefix: Tensor,
    behind: Tensor,
    words: Tensor,
    block_table: Tensor,
    max_rows: int,
    scale: float,
    soft_cap: float = 0.0,
    window: int = 0,
    depth: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    splits: int | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Attention of the rows of B requests over the paged K/V cache, into `out`; rows of no request are left alone.

    The rows of a request need not be those of its whole tree: a draft model asks for one level while the earlier ones
    stand in the cache. What is launched depends on shapes and on the arguments that are no tensors, never on values on
    the device.

    Args:
        query: [R, H, D] float16, bfloat16 or float32.
        key_cache, value_cache: [blocks, P, G, D], views of vLLM's cache; `query`'s dtype, float8_e4m3fn or float8_e5m2.
        out: [R, H, D], written.
        start: [B + 1] int32, first row of each request, and the end. A request may have no rows.
        prefix: [B] int32, tokens before the root: all rows of the request see them.
        behind: [B] int32, tokens of the tree that stand in the cache behind the prefix, the root first; at most 64 * W.
        words: [R, W] int64, W = 1..4: bit j % 64 of word j // 64 is set where a row sees tree token j. A row sees itself.
        block_table: [B, M] int32. What stands behind a request's length or before its window is not read.
        max_rows: no request has more rows.
        scale: of the scores, above 0.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 = as they are.
        window: a row sees only the last `window` tokens, itself included; 0 = all. Above 256: its tree is always inside.
        depth: [R] int32, depth of each row in its tree. Needed with a window.
        k_scale, v_scale: one float32 each, what an 8-bit cache is to be multiplied by; read from the device by each launch.
        splits: parts of a context that are computed side by side; None = `choose_splits`.
        scratch: used with more than one part; None = allocated.
    """
    rows, heads, dim = query.shape
    _, size, groups, _ = key_cache.shape
    batch, blocks = block_table.shape
    assert key_cache.shape == value_cache.shape and key_cache.shape[3] == dim and heads % groups == 0
    assert query.stride(2) == key_cache.stride(3) == value_cache.stride(3) == out.stride(2) == 1
    assert out.shape == query.shape and 32 <= dim <= 256 and scale > 0 and soft_cap >= 0
    assert key_cache.dtype == value_cache.dtype and key_cache.dtype in (query.dtype, *_FP8)
    assert start.shape == (batch + 1,) and prefix.shape == behind.shape == (batch,)
    assert start.dtype == prefix.dtype == behind.dtype == block_table.dtype == torch.int32
    assert start.is_contiguous() and prefix.is_contiguous() and behind.is_contiguous() and block_table.stride(1) == 1
    assert words.dtype == torch.int64 and words.is_contiguous() and len(words) >= rows and 1 <= words.shape[1] <= 4
    assert window == 0 or (window > 256 and depth is not None and depth.dtype == torch.int32 and depth.is_contiguous())
    assert (k_scale is None) == (v_scale is None)
    for each in (k_scale, v_scale):
        assert each is None or (each.numel() == 1 and each.dtype == torch.float32)
    if rows == 0 or batch == 0 or max_rows == 0:
        return

    capability, multiprocessors = _machine(query.device)
    per_group = heads // groups
    pairs = max_rows * per_group
    tile = tile_for(query.dtype, dim, pairs, capability)
    if splits is None:
        splits = choose_splits(tile, pairs, batch, groups, blocks * size, multiprocessors)
    split = splits > 1
    if split and scratch is None:
        scratch = Scratch.empty(rows, heads, splits, dim, query.device)
    partial, peak, total = (scratch.partial, scratch.peak, scratch.total) if split and scratch else (None, None, None)
    if partial is not None and peak is not None and total is not None:
        assert min(peak.numel(), total.numel(), partial.numel() // dim) >= rows * heads * splits
        assert partial.is_contiguous() and peak.is_contiguous() and total.is_contiguous()
        assert partial.dtype == peak.dtype == total.dtype == torch.float32

    padded = triton.next_power_of_2(dim)
    tree_attention_kernel[splits * triton.cdiv(pairs, tile.pairs), groups, batch](
        query, key_cache, value_cache, out, partial, peak, total,
        start, prefix, behind, words, depth, block_table, k_scale, v_scale,
        float(scale), float(soft_cap), splits, block_table.stride(0),
        *query.stride()[:2], *out.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
        BLOCK_SIZE=size, HEADS=heads, PER_GROUP=per_group, DIM=dim, PADDED=padded, WORDS=words.shape[1],
        SOFT_CAP=soft_cap > 0, WINDOW=window, SCALED=k_scale is not None, SPLIT=split,
        BLOCK_M=tile.pairs, BLOCK_N=tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        # Few pairs: a program for each two, so that all parts are fetched at once. To be measured.
        block = 16 if rows * heads >= 64 * multiprocessors else 2
        merge_kernel[(triton.cdiv(rows * heads, block),)](
            partial, peak, total, out, start, batch, *out.stride()[:2],
            HEADS=heads, DIM=dim, PADDED=padded, SPLITS=splits, BLOCK=block, num_warps=4,
        )  # fmt: skip
