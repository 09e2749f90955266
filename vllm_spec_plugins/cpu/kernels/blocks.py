# SPDX-License-Identifier: Apache-2.0
"""Block tables and slot mappings (vllm/v1/worker/gpu/block_table.py). These kernels get the tables as raw addresses."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.launch import needs_grid
from vllm_spec_plugins.cpu.kernels.views import at_address, view

Tensor = torch.Tensor


@needs_grid
def gather_block_tables(
    grid: tuple[int, ...],
    batch_idx_to_req_idx: Tensor,
    src_block_table_ptrs: Tensor,
    dst_block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    num_blocks_ptr: Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the valid blocks of each request's row to its row of the batch; zero the rows that pad the batch."""
    num_groups, num_rows = grid
    states, num_blocks_of = view(batch_idx_to_req_idx), view(num_blocks_ptr)
    sources, targets = view(src_block_table_ptrs).tolist(), view(dst_block_table_ptrs).tolist()
    for group, stride in enumerate(view(block_table_strides).tolist()[:num_groups]):
        num_blocks = num_blocks_of[group][states]
        used, fewest = int(num_blocks.max()), int(num_blocks.min())
        source = at_address(sources[group], num_blocks_of.shape[1], stride)
        target = at_address(targets[group], num_rows, stride)
        # Entries beyond a request's blocks keep what they had, as the kernel leaves them.
        target[:num_reqs, :fewest] = source[states, :fewest]
        if used > fewest:
            valid = np.arange(fewest, used) < num_blocks[:, None]
            np.copyto(target[:num_reqs, fewest:used], source[states, fewest:used], where=valid)
        if num_rows > num_reqs:
            target[num_reqs:] = 0


@needs_grid
def compute_slot_mappings(
    grid: tuple[int, ...],
    max_num_tokens: int,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    pos: Tensor,
    block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    block_sizes: Tensor,
    slot_mapping_enabled: Tensor,
    dcp_sharded: Tensor,
    slot_mappings_ptr: Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Slot of every token: block number * block size + offset; PAD_ID for rows without blocks and beyond the batch."""
    if CP_SIZE != 1:
        raise NotImplementedError("context parallelism is not supported on the CPU: decode and prefill sizes must be 1")
    num_reqs = grid[1] - 1
    states, starts = view(idx_mapping), view(query_start_loc)
    begin, end = int(starts[0]), int(starts[num_reqs])
    if end - begin == num_reqs:
        rows = states
    else:
        rows = np.repeat(states, starts[1 : num_reqs + 1] - starts[:num_reqs])
    # A row of -1 owns no blocks: its table must not be read.
    real = rows >= 0 if np.count_nonzero(states < 0) else None
    known = rows if real is None else np.where(real, rows, 0)
    # The tables' height is not among the arguments; a power of two that holds all rows keeps the views few.
    height = 1 << int(states.max(initial=0)).bit_length()
    positions = view(pos)[begin:end]
    addresses, enabled = view(block_table_ptrs).tolist(), view(slot_mapping_enabled).tolist()
    strides, sizes = view(block_table_strides).tolist(), view(block_sizes).tolist()
    slot_mappings = view(slot_mappings_ptr)
    for group in range(grid[0]):
        slots, size = slot_mappings[group], sizes[group]
        slots[end:max_num_tokens] = PAD_ID
        if not enabled[group]:
            slots[begin:end] = PAD_ID
            continue
        block = positions // size
        table = at_address(addresses[group], height, strides[group])
        # block * size + offset, the offset being position - position // size * size
        slots[begin:end] = (table[known, block] - block) * size + positions
        if real is not None:
            slots[begin:end][~real] = PAD_ID


KERNELS = {
    "vllm.v1.worker.gpu.block_table._gather_block_tables_kernel": gather_block_tables,
    "vllm.v1.worker.gpu.block_table._compute_slot_mappings_kernel": compute_slot_mappings,
}
