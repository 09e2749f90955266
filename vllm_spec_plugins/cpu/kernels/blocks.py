# SPDX-License-Identifier: Apache-2.0
"""Block tables and slot mappings (vllm/v1/worker/gpu/block_table.py). These kernels get the tables as raw addresses."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.launch import needs_grid
from vllm_spec_plugins.cpu.kernels.views import at_address

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
    states = batch_idx_to_req_idx.numpy()
    max_num_reqs = num_blocks_ptr.shape[1]
    sources, targets = src_block_table_ptrs.tolist(), dst_block_table_ptrs.tolist()
    for group, stride in enumerate(block_table_strides.tolist()[:num_groups]):
        num_blocks = num_blocks_ptr.numpy()[group, states]
        used = int(num_blocks.max(initial=0))
        source = at_address(sources[group], max_num_reqs, stride)
        target = at_address(targets[group], num_rows, stride)
        valid = np.arange(used) < num_blocks[:, None]
        # Entries beyond a request's blocks keep what they had, as the kernel leaves them.
        np.copyto(target[:num_reqs, :used], source[states, :used], where=valid)
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
    states = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: num_reqs + 1]
    begin, end = int(starts[0]), int(starts[-1])
    rows = np.repeat(states, starts[1:] - starts[:-1])
    positions = pos.numpy()[begin:end]
    addresses, enabled = block_table_ptrs.tolist(), slot_mapping_enabled.tolist()
    strides, sizes = block_table_strides.tolist(), block_sizes.tolist()
    real = rows >= 0
    all_real = bool(real.all())
    most = int(rows.max(initial=0)) + 1
    for group in range(grid[0]):
        slots = slot_mappings_ptr.numpy()[group]
        slots[end:max_num_tokens] = PAD_ID
        if not enabled[group]:
            slots[begin:end] = PAD_ID
            continue
        size = sizes[group]
        table = at_address(addresses[group], most, strides[group])
        block, offset = np.divmod(positions, size)
        if all_real:
            slots[begin:end] = table[rows, block] * np.int64(size) + offset
        else:
            # A row of -1 owns no blocks: its table must not be read.
            slots[begin:end] = np.where(real, table[np.where(real, rows, 0), block] * np.int64(size) + offset, PAD_ID)


KERNELS = {
    "vllm.v1.worker.gpu.block_table._gather_block_tables_kernel": gather_block_tables,
    "vllm.v1.worker.gpu.block_table._compute_slot_mappings_kernel": compute_slot_mappings,
}
