# SPDX-License-Identifier: Apache-2.0
"""Ranked candidates on the CPU: what builders.py and ranks.py compute of them with tensors, as compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled


@compiled
def ranked(candidates: Any, chance: Any, depth: Any, last: Any, parent: Any, nodes: int, limit: int, least: Any) -> Any:
    """Tokens, parents and chances [B, nodes] of `builders.ranked`.

    candidates, chance [B, D, K]; of the C nodes that can be among the best: depth (0-based), own rank, parent + 1.
    """
    batch, count = len(candidates), len(last)
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    out_chance = np.zeros((batch, nodes))
    falling, product = np.empty_like(chance[0]), np.empty(count, dtype=chance.dtype)
    rows = np.zeros(count + 1, dtype=np.int64)
    for b in range(batch):
        for deep in range(falling.shape[0]):
            lowest = chance[b, deep, 0]
            for rank in range(falling.shape[1]):
                lowest = min(lowest, chance[b, deep, rank])
                falling[deep, rank] = lowest
        for node in range(count):
            product[node] = falling[depth[node], last[node]]
            if parent[node]:
                product[node] *= product[parent[node] - 1]
        # The limit-th largest; of its equals those that stand first are taken, and ancestors stand first.
        open_places = min(limit, count)
        if open_places == 0:
            continue
        floor = np.sort(product)[count - open_places]
        for node in range(count):
            if product[node] > floor:
                open_places -= 1
        row = 0
        for node in range(count):
            if product[node] < floor or product[node] < least:
                continue
            if product[node] == floor:
                if open_places == 0:
                    continue
                open_places -= 1
            out_tokens[b, row] = candidates[b, depth[node], last[node]]
            out_parents[b, row] = rows[parent[node]]
            out_chance[b, row] = product[node]
            row += 1
            rows[node + 1] = row
    return out_tokens, out_parents, out_chance


@compiled
def chosen(candidates: Any, chance: Any, depth: Any, last: Any, parent: Any, limit: int) -> Any:
    """Tokens, parents and chances [B, N] of `builders.chosen`; arguments as those of `ranked`, N nodes."""
    batch, nodes = len(candidates), len(last)
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    out_chance, product = np.zeros((batch, nodes)), np.empty(nodes, dtype=chance.dtype)
    for b in range(batch):
        for node in range(min(limit, nodes)):
            product[node] = chance[b, depth[node], last[node]]
            if parent[node]:
                product[node] *= product[parent[node] - 1]
            out_tokens[b, node], out_parents[b, node] = candidates[b, depth[node], last[node]], parent[node]
            out_chance[b, node] = product[node]
    return out_tokens, out_parents, out_chance


@compiled
def judge(
    offered: Any,
    offered_at: Any,
    hits: Any,
    seen: Any,
    slots: Any,
    token_ids: Any,
    lengths: Any,
    num_emitted: Any,
    keep: Any,
) -> None:
    """`Ranks.observe`, in place: offered [R, D, K], offered_at [R], hits [R + 1, D, K] and seen [R + 1, D, 1] float32.

    keep: float32, the share of a count that stays when its depth is judged.
    """
    depth, per_depth = offered.shape[1:]
    one, everyone = np.float32(1.0), len(offered)
    new_hits, new_seen = np.zeros((depth, per_depth), dtype=np.float32), np.zeros(depth, dtype=np.float32)
    for b in range(len(slots)):
        slot = slots[b]
        begin = lengths[b] - num_emitted[b]
        if offered_at[slot] == begin:
            for deep in range(min(depth, num_emitted[b])):
                if offered[slot, deep, 0] < 0:
                    continue
                token = token_ids[slot, begin + deep]
                seen[slot, deep, 0] = seen[slot, deep, 0] * keep + one
                new_seen[deep] += one
                for rank in range(per_depth):
                    hit = one if offered[slot, deep, rank] == token else np.float32(0.0)
                    hits[slot, deep, rank] = hits[slot, deep, rank] * keep + hit
                    new_hits[deep, rank] += hit
        offered[slot] = -1
    for deep in range(depth):
        if new_seen[deep] > 0:
            seen[everyone, deep, 0] = seen[everyone, deep, 0] * keep + new_seen[deep]
            for rank in range(per_depth):
                hits[everyone, deep, rank] = hits[everyone, deep, rank] * keep + new_hits[deep, rank]


@compiled
def rank_chances(hits: Any, seen: Any, slots: Any, first: Any, prior: Any) -> Any:
    """[B, D, K] float32: `Ranks.chance`; first [K] float32, before anything is seen; prior float32, belief in it."""
    _, depth, per_depth = hits.shape
    chance = np.empty((len(slots), depth, per_depth), dtype=np.float32)
    for deep in range(depth):
        for rank in range(per_depth):
            everyone = (hits[-1, deep, rank] + prior * first[rank]) / (seen[-1, deep, 0] + prior)
            for b in range(len(slots)):
                slot = slots[b]
                chance[b, deep, rank] = (hits[slot, deep, rank] + prior * everyone) / (seen[slot, deep, 0] + prior)
    return chance
