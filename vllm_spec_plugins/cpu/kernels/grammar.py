# SPDX-License-Identifier: Apache-2.0
"""Grammar bit masks and thinking budgets (vllm/v1/worker/gpu/structured_outputs.py, sample/thinking_budget.py)."""

from __future__ import annotations

import numpy as np
import torch

from vllm_spec_plugins.cpu.kernels.launch import needs_grid
from vllm_spec_plugins.cpu.kernels.views import Array

Tensor = torch.Tensor

# What a forced token's logit is set to.
_FORCED = 1.0e9


@needs_grid
def apply_grammar_bitmask(
    grid: tuple[int, ...],
    logits_ptr: Tensor,
    logits_stride: int,
    logits_indices_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    bitmask_ptr: Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Mask the tokens whose bit is 0. Mask i belongs to logits row mapping // MASK_STRIDE (request), % MASK_STRIDE."""
    num_masks = grid[0]
    request, position = np.divmod(logits_indices_ptr.numpy()[:num_masks], MASK_STRIDE)
    cu_num_logits = cu_num_logits_ptr.numpy()
    rows = cu_num_logits[request] + position
    active = np.flatnonzero(rows < cu_num_logits[request + 1])
    packed = np.ascontiguousarray(bitmask_ptr.numpy()[active]).view(np.uint8)
    allowed = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little").view(np.bool_)
    index = torch.from_numpy(rows[active].astype(np.int64))
    # Through torch: these logits have the model's dtype.
    logits_ptr[index] = logits_ptr[index].masked_fill_(torch.from_numpy(~allowed), -torch.inf)


def _matches(tokens: Array, marker: Array, begin: int) -> Array:
    """Ascending positions from `begin` at which `marker` stands in `tokens`."""
    if len(tokens) - begin < len(marker):
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens[begin:], len(marker))
    return begin + np.flatnonzero((windows == marker).all(axis=1))


def update_committed_marker_cache(
    req_ids_ptr: Tensor,
    thinking_token_budget_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    cached_last_start_ptr: Tensor,
    cached_last_end_ptr: Tensor,
    cached_scan_pos_ptr: Tensor,
    reasoning_start_token_ids_ptr: Tensor,
    natural_reasoning_end_token_ids_ptr: Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    MAX_LEN: int,
    BLOCK: int,
) -> None:
    """Remember where the reasoning markers last stand among the committed tokens; a cold scan goes backward by blocks."""
    markers = (reasoning_start_token_ids_ptr.numpy(), natural_reasoning_end_token_ids_ptr.numpy())
    caches = (cached_last_start_ptr.numpy(), cached_last_end_ptr.numpy())
    scan_positions = cached_scan_pos_ptr.numpy()
    states = req_ids_ptr.numpy()
    for state in states[thinking_token_budget_ptr.numpy()[states] >= 0]:
        total_len = int(total_len_ptr.numpy()[state])
        tokens = all_token_ids_ptr.numpy()[state, :total_len]
        scan = int(scan_positions[state])
        last = [int(cache[state]) for cache in caches]
        if scan > total_len:
            scan, last = 0, [-1, -1]
        found = [_matches(tokens, marker, scan) for marker in markers]
        if scan == 0 and last == [-1, -1]:
            # The kernel stops at the first block from the end that holds a marker; an older one is not looked for.
            newest = max((int(positions[-1]) for positions in found if len(positions)), default=-1)
            floor = total_len - BLOCK * ((total_len - 1 - newest) // BLOCK + 1)
            found = [positions[positions >= max(floor, 0)] for positions in found]
        for cache, positions, before in zip(caches, found, last, strict=True):
            cache[state] = positions[-1] if len(positions) else before
        scan_positions[state] = max(total_len - (MAX_LEN - 1), 0)


def thinking_budget(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    thinking_token_budget_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    input_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cached_last_start_ptr: Tensor,
    cached_last_end_ptr: Tensor,
    reasoning_start_token_ids_ptr: Tensor,
    natural_reasoning_end_token_ids_ptr: Tensor,
    reasoning_end_token_ids_ptr: Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    END_LEN: int,
) -> None:
    """Force the next token of the end marker where a request has reasoned for its budget (drafts included)."""
    states = expanded_idx_mapping_ptr.numpy()
    budgets = thinking_token_budget_ptr.numpy()[states]
    start_marker = reasoning_start_token_ids_ptr.numpy()
    natural_end = natural_reasoning_end_token_ids_ptr.numpy()
    forced_end = reasoning_end_token_ids_ptr.numpy()
    longest = max(START_LEN, NATURAL_END_LEN, END_LEN)
    logits = logits_ptr.numpy()
    for row in np.flatnonzero(budgets >= 0):
        state, local = states[row], int(expanded_local_pos_ptr.numpy()[row])
        total_len = int(total_len_ptr.numpy()[state])
        effective_len = total_len + local
        # The end of the committed tokens, and the drafts of the rows up to this one behind it.
        base = max(total_len - longest + 1, 0)
        committed = all_token_ids_ptr.numpy()[state, base:total_len]
        drafts = input_ids_ptr.numpy()[row - local + 1 : row + 1]
        tail = np.concatenate((committed, drafts))

        last = []
        for cache, marker in ((cached_last_start_ptr, start_marker), (cached_last_end_ptr, natural_end)):
            begin = max(total_len - len(marker) + 1, 0)
            positions = _matches(tail, marker, begin - base)
            last.append(base + int(positions[-1]) if len(positions) else int(cache.numpy()[state]))
        last_start, last_end = last
        if last_start < 0 or last_start <= last_end or effective_len - (last_start + START_LEN) < budgets[row]:
            continue
        written = 0  # tokens of the end marker that stand at the end already
        for length in range(1, min(END_LEN - 1, effective_len) + 1):
            if np.array_equal(tail[len(tail) - length :], forced_end[:length]):
                written = length
        logits[row, forced_end[written]] = _FORCED


_SAMPLE = "vllm.v1.worker.gpu.sample."
KERNELS = {
    "vllm.v1.worker.gpu.structured_outputs._apply_grammar_bitmask_kernel": apply_grammar_bitmask,
    _SAMPLE + "thinking_budget._update_committed_marker_cache_kernel": update_committed_marker_cache,
    _SAMPLE + "thinking_budget._thinking_budget_kernel": thinking_budget,
}
