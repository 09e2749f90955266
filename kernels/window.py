# SPDX-License-Identifier: Apache-2.0
"""The lookahead window on the device: `advance` is `proposers.window.LookaheadWindow.advance`, its plain version.

One launch in place of some 50: a program per request moves its window in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _picked(cell, count, text_ptr, mask):
    """Tokens of the text for cells, as `LookaheadWindow._picked` picks them."""
    salt = (cell.to(tl.int64) * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF
    index = ((salt ^ (count * 0x85EBCA6B)) * 0xC2B2AE35 >> 13) % count
    index = tl.where(index < 0, index + count, index)  # the remainder of a negative number is one here
    return tl.load(text_ptr + index, mask=mask, other=0).to(tl.int64)


@triton.jit
def _new(column, mask, drawn_ptr, last, level, start, width, ngram, count, text_ptr, eos_ptr, ends):
    """What was drawn behind the last filled row at these columns; what ends a text is replaced."""
    row = level * width + column
    row = tl.minimum(tl.maximum(tl.where(row > 0, row + start, row), 0), last)
    drawn = tl.load(drawn_ptr + row, mask=mask, other=-1)
    ended = drawn != drawn
    for end in range(ends):
        ended = ended | (drawn == tl.load(eos_ptr + end))
    return tl.where(ended, _picked((ngram - 1) * width + column, count, text_ptr, mask), drawn)


@triton.jit
def _advance_kernel(
    cells_ptr,
    level_ptr,
    start_ptr,
    slots_ptr,
    token_ids_ptr,
    lengths_ptr,
    emitted_ptr,
    drawn_ptr,
    eos_ptr,
    ngrams_ptr,
    real_ptr,
    row_stride,
    rows,
    width,
    draws,
    ends,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + request)
    count = tl.load(lengths_ptr + request)
    emitted = tl.load(emitted_ptr + request)
    level, start = tl.load(level_ptr + slot), tl.load(start_ptr + slot)
    text_ptr = token_ids_ptr + slot * row_stride
    drawn_ptr += request * draws
    cells_ptr += slot * rows * width
    ngram, last = rows + 1, draws - 1

    edge = level * width + width - 1
    edge = tl.minimum(tl.maximum(tl.where(edge > 0, edge + start, edge), 0), last)
    ran = (start >= 0) & (level >= 0) & (emitted > 0) & (tl.load(drawn_ptr + edge) >= 0)
    ran = ran.to(tl.int64)
    whole = tl.where(level == rows - 1, ran, 0)
    row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_W)[None, :]
    inside = (row < rows) & (column < width)
    old = tl.load(cells_ptr + row * width + column, mask=inside, other=0)
    each = tl.arange(0, BLOCK_W)
    new = _new(each, each < width, drawn_ptr, last, level, start, width, ngram, count, text_ptr, eos_ptr, ends)
    to = ngrams_ptr + (request * width + column) * ngram
    tl.store(to + row, old, mask=inside)
    tl.store(ngrams_ptr + (request * width + each) * ngram + rows, new, mask=each < width)
    tl.store(real_ptr + request * width + each, tl.zeros([BLOCK_W], tl.int64) + whole, mask=each < width)

    # Every cell keeps its own position of the text: the root moved on by the emitted tokens, a full window's rows by one.
    ahead = column + ran * (emitted - whole)
    source = tl.minimum(tl.maximum(ahead, 0), width - 1) + row * 0
    up = row + whole
    fresh = up == tl.minimum(level + 1, rows)
    moved = tl.load(cells_ptr + up * width + source, mask=inside & (up < rows), other=0)
    drawn = _new(source, inside & fresh, drawn_ptr, last, level, start, width, ngram, count, text_ptr, eos_ptr, ends)
    # Until a window has a row its width is nought, as far as known tokens go.
    known = ahead < tl.where(level >= 0, width, 0)
    kept = tl.where(known, tl.where(fresh, drawn, moved), _picked(row * width + column, count, text_ptr, inside))
    root = tl.load(text_ptr + tl.maximum(count - 1, 0)).to(tl.int64)
    kept = tl.where((row == 0) & (column == 0), root, kept)
    # Every thread has read the window before any writes to it.
    tl.debug_barrier()
    tl.store(cells_ptr + row * width + column, kept, mask=inside)
    tl.store(level_ptr + slot, tl.minimum(tl.maximum(level + ran, 0), rows - 1))


def advance(
    cells: Tensor,
    level: Tensor,
    start: Tensor,
    slots: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    num_emitted: Tensor,
    drawn: Tensor,
    eos: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Take in the last row's draws and move the windows to the new roots.

    Args:
        cells: [R, rows, W] int64, level, start: [R] int64: the state of a `LookaheadWindow`; cells and level are written.
        slots, lengths, num_emitted: [B] int64, slots distinct; lengths at least 1.
        token_ids: [R, max_len] int32; drawn: [B, N + 1] int64.
        eos: [E] int64, tokens that are replaced.
        out: n-grams, and [B, W] int64 for whether they are real, to be written.

    Returns:
        n-grams [B, W, rows + 1] int64 read off the columns, and which of them are real [B, W] bool.

    Traffic: 16 * R * W bytes of a window, 8 * (R + 1) * W of n-grams, and some R * W tokens of the text.
    """
    (_, rows, width), batch = cells.shape, len(slots)
    for each in (cells, level, start, slots, lengths, num_emitted, drawn, eos):
        assert each.is_contiguous() and each.dtype == torch.int64
    assert slots.shape == lengths.shape == num_emitted.shape == (batch,) and len(drawn) == batch
    assert level.shape == start.shape == (len(cells),) and token_ids.stride(1) == 1
    shape = (batch, width, rows + 1)
    if out is None:
        out = (torch.empty(shape, dtype=torch.int64, device=cells.device), cells.new_empty(batch, width))
    ngrams, real = out
    assert ngrams.shape == shape and real.shape == (batch, width) and ngrams.dtype == real.dtype == torch.int64
    if batch:
        block_r, block_w = triton.next_power_of_2(rows), triton.next_power_of_2(width)
        _advance_kernel[(batch,)](
            cells,
            level,
            start,
            slots,
            token_ids,
            lengths,
            num_emitted,
            drawn,
            eos,
            ngrams,
            real,
            token_ids.stride(0),
            rows,
            width,
            drawn.shape[1],
            len(eos),
            block_r,
            block_w,
            num_warps=max(1, min(4, block_r * block_w // 128)),
        )
    return ngrams, real.bool()
