# SPDX-License-Identifier: Apache-2.0
"""The walk: from the root to the child that equals the target's draw, until there is none.

Nodes that spell the same path agree in their draws, so the walk ends at the deepest row whose whole path was drawn. That
is a sum along every row's path, which pointer doubling (each row asks the row 1, 2, 4, ... places above it) has in
ceil(log2(D)) rounds for all rows at once, where a loop over the levels would wait for memory D times. A rule other than
the walk says itself which nodes are wrong.

Memory traffic per request of N nodes and depth D: 24 N + 8 bytes read (tokens, parents, draws; the draws a second time
at the parents' rows, from the cache), 16 D + 24 written. The launch costs more than the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Walked = tuple[Tensor, Tensor, Tensor, Tensor]

# Sums of weights times the number of rows must fit an int32.
MOST_NODES = 1023


def tree_walk_reference(
    tokens: Tensor, parents: Tensor, drawn: Tensor, max_depth: int, wrong: Tensor | None = None
) -> Walked:
    """As `tree_walk`, in torch: a launch or more per node and per level, each of 24 bytes per request and little else."""
    batch, nodes = tokens.shape
    right = torch.ones(batch, nodes + 1, dtype=torch.bool, device=tokens.device)
    depth = torch.zeros(batch, nodes + 1, dtype=torch.int64, device=tokens.device)
    if wrong is None:
        wrong = (tokens < 0) | (drawn[:, 1:] < 0) | (tokens != drawn.gather(1, parents))
    for child in range(nodes):
        above = parents[:, child : child + 1]
        right[:, child + 1] = right.gather(1, above).squeeze(1) & ~wrong[:, child]
        depth[:, child + 1] = depth.gather(1, above).squeeze(1) + 1
    row = depth.masked_fill(~right, -1).argmax(1, keepdim=True)
    last, count = drawn.gather(1, row), depth.gather(1, row)

    path = torch.zeros(batch, max_depth, dtype=torch.int64, device=tokens.device)
    emitted = torch.full((batch, max_depth + 1), -1, dtype=torch.int64, device=tokens.device)
    emitted.scatter_(1, count, last)
    for step in range(min(max_depth, nodes), 0, -1):
        on_path = depth.gather(1, row) == step  # row 0 never is
        index = (row - 1).clamp(min=0)
        path[:, step - 1 : step] = row.where(on_path, 0)
        emitted[:, step - 1 : step] = tokens.gather(1, index).where(on_path, emitted[:, step - 1 : step])
        row = parents.gather(1, index).where(on_path, row)
    return path, count.squeeze(1), emitted, ((count + 1) * (last >= 0)).squeeze(1)


# Strides are those of rows of N or of a tensor that a rule has made: not worth a program for each.
@triton.jit(do_not_specialize=["tokens_row_stride", "parents_row_stride", "drawn_row_stride", "wrong_row_stride"])
def tree_walk_kernel(
    tokens_ptr,
    tokens_row_stride,
    parents_ptr,
    parents_row_stride,
    drawn_ptr,
    drawn_row_stride,
    wrong_ptr,
    wrong_row_stride,
    path_ptr,
    num_accepted_ptr,
    emitted_ptr,
    num_emitted_ptr,
    num_nodes,
    max_depth,
    HAS_WRONG: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    tokens_ptr += request * tokens_row_stride
    parents_ptr += request * parents_row_stride
    drawn_ptr += request * drawn_row_stride

    row = tl.arange(0, BLOCK_ROWS)
    is_node = (row > 0) & (row <= num_nodes)
    node = row - 1
    above = tl.load(parents_ptr + node, mask=is_node, other=0).to(tl.int32)
    if HAS_WRONG:
        wrong = tl.load(wrong_ptr + request * wrong_row_stride + node, mask=is_node, other=1) != 0
    else:
        token = tl.load(tokens_ptr + node, mask=is_node, other=-1)
        own = tl.load(drawn_ptr + row, mask=is_node, other=-1)
        asked = tl.load(drawn_ptr + above, mask=is_node, other=-1)
        wrong = (token < 0) | (own < 0) | (token != asked)
    # A right row weighs 1 and a wrong one more than all right ones together: the sum is the depth, or negative.
    total = tl.where(wrong, -BLOCK_ROWS, 1)
    total = tl.where(row == 0, 0, tl.where(is_node, total, -BLOCK_ROWS))
    for _ in tl.static_range(ROUNDS):
        total += tl.gather(total, above, 0)  # the root, weight 0, is its own parent
        above = tl.gather(above, above, 0)
    best = tl.max(total * BLOCK_ROWS + (BLOCK_ROWS - 1 - row), axis=0)  # the first of equally deep ones
    depth = best // BLOCK_ROWS
    at = BLOCK_ROWS - 1 - best % BLOCK_ROWS

    last = tl.load(drawn_ptr + at)
    tl.store(num_accepted_ptr + request, depth.to(tl.int64))
    tl.store(num_emitted_ptr + request, tl.where(last >= 0, depth + 1, 0).to(tl.int64))
    path_ptr += request * max_depth
    emitted_ptr += request * (max_depth + 1)
    # Padding and path are written to different places: what two threads write needs no order.
    place = tl.arange(0, BLOCK_DEPTH)
    tl.store(path_ptr + place, tl.zeros((BLOCK_DEPTH,), tl.int64), mask=(place >= depth) & (place < max_depth))
    behind = tl.where(place == depth, last, -1)
    tl.store(emitted_ptr + place, behind, mask=(place >= depth) & (place <= max_depth))
    while at > 0:
        depth -= 1
        tl.store(path_ptr + depth, at.to(tl.int64))
        tl.store(emitted_ptr + depth, tl.load(tokens_ptr + at - 1))
        at = tl.load(parents_ptr + at - 1).to(tl.int32)


def tree_walk(
    tokens: Tensor,
    parents: Tensor,
    drawn: Tensor,
    max_depth: int,
    wrong: Tensor | None = None,
    out: Walked | None = None,
) -> Walked:
    """Accept in each tree the path to the deepest row, the first of several, that has no wrong node above it or on it.

    Args:
        tokens: [B, N] int64; -1 = no node. N <= 1023.
        parents: [B, N] int64, row of the parent, 0 = root; parents[:, j] <= j. May be expanded from [1, N].
        drawn: [B, N + 1] int64, the target's draw at every row, -1 where the row was not present.
        max_depth: D, no node lies deeper.
        wrong: [B, N] bool, nodes that a rule does not keep, absent ones among them; None = the walk: nodes that are absent or not
            their parent's draw.
        out: the four results, contiguous, to be written.

    Returns:
        path [B, D], num_accepted [B], emitted [B, D + 1], num_emitted [B], int64: the fields of `tree.accept.Acceptance`.
    """
    batch, nodes = tokens.shape
    assert nodes <= MOST_NODES, f"{nodes} nodes"
    assert parents.shape == (batch, nodes) and drawn.shape == (batch, nodes + 1)
    assert tokens.dtype == parents.dtype == drawn.dtype == torch.int64
    for each in (tokens, parents, drawn, *(() if wrong is None else (wrong,))):
        assert each.stride(1) == 1 or each.shape[1] <= 1
    assert wrong is None or (wrong.shape == tokens.shape and wrong.dtype == torch.bool)
    if out is None:
        sizes = ((batch, max_depth), (batch,), (batch, max_depth + 1), (batch,))
        path, num_accepted, emitted, num_emitted = (
            torch.empty(size, dtype=torch.int64, device=tokens.device) for size in sizes
        )
    else:
        path, num_accepted, emitted, num_emitted = out
        assert path.shape == (batch, max_depth) and emitted.shape == (batch, max_depth + 1)
        assert num_accepted.shape == num_emitted.shape == (batch,)
        assert all(each.is_contiguous() and each.dtype == torch.int64 for each in out)
    block_rows = max(32, triton.next_power_of_2(nodes + 1))
    if batch:
        tree_walk_kernel[(batch,)](
            tokens,
            tokens.stride(0),
            parents,
            parents.stride(0),
            drawn,
            drawn.stride(0),
            wrong,
            0 if wrong is None else wrong.stride(0),
            path,
            num_accepted,
            emitted,
            num_emitted,
            nodes,
            max_depth,
            HAS_WRONG=wrong is not None,
            # As many doublings as take the deepest node to the root.
            ROUNDS=max(max_depth - 1, 0).bit_length(),
            BLOCK_ROWS=block_rows,
            BLOCK_DEPTH=max(32, triton.next_power_of_2(max_depth + 1)),
            # Within one warp a gather is shuffles, rows of a thread squared; among warps it goes through shared memory.
            num_warps=max(1, block_rows // 64),
        )
    return path, num_accepted, emitted, num_emitted
