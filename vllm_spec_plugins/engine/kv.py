# SPDX-License-Identifier: Apache-2.0
"""K/V commit: the accepted nodes' keys and values move to the slots that plain decoding would have written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.engine.attention import key_blocks, value_blocks
from vllm_spec_plugins.engine.backend import on_triton


def moves(path: Tensor, num_accepted: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which accepted nodes stand in the wrong slot.

    Args:
        path: [B, D] int64, `num_accepted` [B] rows each, behind the root: as in Acceptance.
        root: [B] int64, position of each request's root.

    Returns:
        request, source position, destination position, each [M] int64. A path that is a prefix of the row order (a
        chain, or the first n-gram of a trie) needs no move.
    """
    steps = torch.arange(1, path.shape[1] + 1, device=root.device)
    accepted = steps <= num_accepted.unsqueeze(1)
    request, step = (accepted & (path != steps)).nonzero(as_tuple=True)
    start = root[request]
    return request, start + path[request, step], start + step + 1


def distinct(caches: Iterable[Tensor]) -> list[Tensor]:
    """Each cache once. Layers may share one: moved twice, the second node of 2 -> 1, 3 -> 2 would come to stand in both slots."""
    return list({cache.data_ptr(): cache for cache in caches}.values())


class PathCommit:
    """Commits paths in the caches of one K/V cache group; what kernels need to know of them is found out once.

    Args:
        caches: per layer, as for `commit`.
    """

    def __init__(self, caches: Sequence[Tensor], block_size: int) -> None:
        self.caches, self.block_size = caches, block_size
        self.pointers: list[Any] = []
        if caches and kernels_for(caches[0]):
            from vllm_spec_plugins.kernels.kv_commit import Pointers

            kinds: dict[Any, list[Tensor]] = {}
            for cache in caches:
                kinds.setdefault((cache.shape, cache.stride(), cache.dtype), []).append(cache)
            self.pointers = [Pointers.of(alike) for alike in kinds.values()]

    def __call__(self, block_table: Tensor, slots: Tensor, root: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """As `commit_paths`, with the block table of all requests [R, max_blocks] and this batch's `slots` [B] in it."""
        if loops_for(root):
            request, source, target = moves(path, num_accepted, root)
            if len(request):
                commit(self.caches, block_table[slots[request]], self.block_size, source, target)
            return
        if kernels_for(root):
            from vllm_spec_plugins.kernels.kv_commit import kv_commit

            for alike in self.pointers:
                kv_commit(alike, block_table, root, path, num_accepted, slots)
            return
        commit_paths(self.caches, block_table[slots], self.block_size, root, path, num_accepted)


def commit_paths(
    caches: Sequence[Tensor], block_table: Tensor, block_size: int, root: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    """Move each accepted node to the slot of its token, without knowing on the host how many there are.

    Args:
        caches: as for `commit`.
        block_table: [B, max_blocks] int32.
        root: [B] int64, position of each request's root.
        path: [B, D] int64, `num_accepted` [B] rows each, behind the root: as in Acceptance.
    """
    step = torch.arange(1, path.shape[1] + 1, device=path.device)
    moved = step <= num_accepted.unsqueeze(1)
    # What is not there to be moved stays in a slot that is the request's own and that nothing moves to: the root's, or, where
    # nothing is accepted and there may be no root, the first token's.
    place = root.where(num_accepted > 0, 0).unsqueeze(1)
    source, target = place + path * moved, place + step * moved
    request = torch.arange(len(path), device=path.device).repeat_interleave(path.shape[1])
    commit(caches, block_table[request], block_size, source.view(-1), target.view(-1))


def commit(caches: Sequence[Tensor], block_table: Tensor, block_size: int, source: Tensor, target: Tensor) -> None:
    """Move keys and values between positions, in every layer's paged cache.

    Args:
        caches: per layer [blocks, G, P, 2 * D], as the device's attention backend lays them out (on the CPU in the "vec" layout,
            see `attention.key_blocks`).
        block_table: [M, max_blocks] int32, the block table row of each move's request.
        source, target: [M] int64 positions. Targets may be other moves' sources: all are read before any is written.
    """

    def slot(position: Tensor) -> tuple[Tensor, Tensor]:
        block = block_table.gather(1, (position // block_size).unsqueeze(1)).squeeze(1).long()
        return block, position % block_size

    (from_block, from_offset), (to_block, to_offset) = slot(source), slot(target)
    for cache in caches:
        if on_triton(cache.device):  # a slot's keys and values stand side by side
            cache[to_block, :, to_offset] = cache[from_block, :, from_offset]
            continue
        keys, values = key_blocks(cache), value_blocks(cache)
        key, value = keys[from_block, :, :, from_offset], values[from_block, :, from_offset]
        keys[to_block, :, :, to_offset] = key
        values[to_block, :, to_offset] = value
