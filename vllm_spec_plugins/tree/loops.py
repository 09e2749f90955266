# SPDX-License-Identifier: Apache-2.0
"""Trees on the CPU: what tree.py, accept.py, builders.py and ranks.py compute with tensors, as compiled loops.

Arrays as the tensors there: B trees of N nodes, int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled


@compiled
def depths(parents: Any) -> Any:
    """[B, N + 1]: depth of every row."""
    batch, nodes = parents.shape
    depth = np.zeros((batch, nodes + 1), dtype=np.int64)
    for b in range(batch):
        for node in range(nodes):
            depth[b, node + 1] = depth[b, parents[b, node]] + 1
    return depth


@compiled
def ancestors(parents: Any) -> Any:
    """[B, N + 1, N + 1] bool: [b, i, j] is true when row j lies on the path from the root to row i, i included."""
    batch, nodes = parents.shape
    reach = np.zeros((batch, nodes + 1, nodes + 1), dtype=np.bool_)
    for b in range(batch):
        reach[b, 0, 0] = True
        for node in range(nodes):
            reach[b, node + 1] = reach[b, parents[b, node]]
            reach[b, node + 1, node + 1] = True
    return reach


@compiled
def paths(parents: Any, depth: Any, row: Any, max_depth: int) -> Any:
    """[B, max_depth]: the rows from the root (left out) down to row[b], padded with 0."""
    path = np.zeros((len(parents), max_depth), dtype=np.int64)
    for b in range(len(parents)):
        at = row[b]
        while at > 0:
            path[b, depth[b, at] - 1] = at
            at = parents[b, at - 1]
    return path


@compiled
def deepest_reachable(parents: Any, depth: Any, wrong: Any) -> Any:
    """[B]: the deepest row, the first of several, with no wrong [B, N] node on its path."""
    batch, nodes = parents.shape
    best = np.zeros(batch, dtype=np.int64)
    open_rows = np.empty(nodes + 1, dtype=np.bool_)
    for b in range(batch):
        open_rows[0] = True
        for node in range(nodes):
            open_rows[node + 1] = open_rows[parents[b, node]] and not wrong[b, node]
            if open_rows[node + 1] and depth[b, node + 1] > depth[b, best[b]]:
                best[b] = node + 1
    return best


@compiled
def walk_end(tokens: Any, parents: Any, depth: Any, drawn: Any) -> Any:
    """[B]: the row where the walk ends, the deepest (the first of several) that the draws [B, N + 1] lead to."""
    wrong = np.empty(tokens.shape, dtype=np.bool_)
    for b in range(len(tokens)):
        for node in range(tokens.shape[1]):
            absent = tokens[b, node] < 0 or drawn[b, node + 1] < 0
            wrong[b, node] = absent or tokens[b, node] != drawn[b, parents[b, node]]
    return deepest_reachable(parents, depth, wrong)


@compiled
def accept_down_to(tokens: Any, parents: Any, depth: Any, row: Any, drawn: Any, max_depth: int) -> Any:
    """Path [B, D], accepted nodes [B], emitted tokens [B, D + 1] and their number [B]: `Acceptance`'s four."""
    batch = len(tokens)
    path = paths(parents, depth, row, max_depth)
    num_accepted = np.empty(batch, dtype=np.int64)
    emitted = np.full((batch, max_depth + 1), -1, dtype=np.int64)
    num_emitted = np.zeros(batch, dtype=np.int64)
    for b in range(batch):
        count, last = depth[b, row[b]], drawn[b, row[b]]
        num_accepted[b] = count
        for step in range(count):
            emitted[b, step] = tokens[b, path[b, step] - 1]
        emitted[b, count] = last
        num_emitted[b] = count + 1 if last >= 0 else 0
    return path, num_accepted, emitted, num_emitted


@compiled
def scheduled(tokens: Any, parents: Any, slots: Any, counts: Any) -> Any:
    """The first counts[b] nodes of the trees in rows slots[b] of tokens and parents [R, N].

    Returns:
        tokens and parents [B, N]; whether some node's parent is not the row before it; the request of each row, [L],
        the roots' rows included.
    """
    batch, nodes = len(slots), tokens.shape[1]
    cut_tokens, cut_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    request = np.empty(batch + counts.sum(), dtype=np.int64)
    branched, row = False, 0
    for b in range(batch):
        for node in range(counts[b]):
            cut_tokens[b, node] = tokens[slots[b], node]
            if cut_tokens[b, node] >= 0:
                cut_parents[b, node] = parents[slots[b], node]
                branched |= cut_parents[b, node] != node
        request[row : row + counts[b] + 1] = b
        row += counts[b] + 1
    return cut_tokens, cut_parents, branched, request


@compiled
def trie(ngrams: Any, nodes: int, limit: int, odds: Any, least: Any) -> Any:
    """Tokens and parents [B, nodes] and gain [B] of `builders.trie`: ngrams [B, G, L], odds [B, G, L] float64."""
    batch, count, length = ngrams.shape
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    gain = np.zeros(batch)
    owner = np.empty((count, length), dtype=np.int64)  # the first n-gram that has the same prefix
    chance = np.empty((count, length))
    for b in range(batch):
        for g in range(count):
            so_far = 1.0
            for step in range(length):
                owner[g, step] = g
                agree = siblings = 0.0
                for h in range(count):
                    if step and not _same(ngrams[b], g, h, step):
                        continue
                    there = odds[b, h, step] if ngrams[b, h, step] >= 0 else 0.0
                    siblings += there
                    if ngrams[b, h, step] == ngrams[b, g, step]:
                        agree += there
                        owner[g, step] = min(owner[g, step], h)
                so_far *= agree / (1.0 + siblings)
                kept = ngrams[b, g, step] >= 0 and owner[g, step] == g
                chance[g, step] = so_far if kept else -1.0
        floor = max(least, 0.0)
        if limit < count * length:
            floor = max(floor, np.sort(chance.ravel())[count * length - limit] if limit else 2.0)
        row = 0
        rows = np.zeros((count, length), dtype=np.int64)
        for g in range(count):
            for step in range(length):
                if owner[g, step] != g:
                    rows[g, step] = rows[owner[g, step], step]
                elif chance[g, step] >= floor and row < limit:
                    out_tokens[b, row] = ngrams[b, g, step]
                    out_parents[b, row] = rows[g, step - 1] if step else 0
                    gain[b] += chance[g, step]
                    row += 1
                    rows[g, step] = row
    return out_tokens, out_parents, gain


@compiled
def _same(ngrams: Any, g: Any, h: Any, length: Any) -> bool:
    """Whether two of the n-grams [G, L] have the same first `length` tokens."""
    step = 0
    while step < length and ngrams[g, step] == ngrams[h, step]:
        step += 1
    return step == length


@compiled
def ranked(candidates: Any, chance: Any, depth: Any, last: Any, parent: Any, nodes: int, limit: int, least: Any) -> Any:
    """Tokens and parents [B, nodes] and gain [B] of `builders.ranked`.

    candidates, chance [B, D, K]; of the C nodes that can be among the best: depth (0-based), own rank, parent + 1.
    """
    batch, count = len(candidates), len(last)
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    gain = np.zeros(batch)
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
            gain[b] += product[node]
            row += 1
            rows[node + 1] = row
    return out_tokens, out_parents, gain


@compiled
def chosen(candidates: Any, chance: Any, depth: Any, last: Any, parent: Any, limit: int) -> Any:
    """Tokens and parents [B, N] and gain [B] of `builders.chosen`; arguments as those of `ranked`, N nodes."""
    batch, nodes = len(candidates), len(last)
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    gain, product = np.zeros(batch), np.empty(nodes, dtype=chance.dtype)
    for b in range(batch):
        for node in range(min(limit, nodes)):
            product[node] = chance[b, depth[node], last[node]]
            if parent[node]:
                product[node] *= product[parent[node] - 1]
            out_tokens[b, node], out_parents[b, node] = candidates[b, depth[node], last[node]], parent[node]
            gain[b] += product[node]
    return out_tokens, out_parents, gain


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
