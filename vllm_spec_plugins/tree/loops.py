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
def follow(
    tokens: Any, parents: Any, slots: Any, grown_at: Any, seen: Any, ends: Any, known: Any, most: Any
) -> tuple[Any, Any, Any, Any]:
    """Which nodes of a draft's trees have come true.

    Args:
        tokens, parents: [R, N], the trees, by slot; a node's K/V stands as many places behind the root as its row.
        slots: [B], the batch's.
        grown_at: [R], position of the root of each tree; -1 = no tree.
        seen: [R], tokens that have K/V, when the tree was grown: its root is the last of them.
        ends: [B], tokens known now; the last one is the new root.
        known: [R, max_len], the tokens.
        most: positions from here on have no K/V.

    Returns:
        request (index into the batch), source and target position of each K/V entry that stands in the wrong place, and
        [B] the tokens that have K/V now.
    """
    batch, nodes = len(slots), tokens.shape[1]
    request = np.empty(batch * nodes, dtype=np.int64)
    source, target = np.empty(batch * nodes, dtype=np.int64), np.empty(batch * nodes, dtype=np.int64)
    now, moves = seen[slots], 0
    for b in range(batch):
        slot = slots[b]
        root, at = grown_at[slot], 0
        if root < 0 or root + 1 != now[b]:
            continue
        while now[b] < ends[b] - 1:
            place, child = now[b], 0
            for node in range(at, nodes):
                if tokens[slot, node] == known[slot, place] and parents[slot, node] == at:
                    child = node + 1
                    break
            if child == 0 or root + child >= most:
                break
            if root + child != place:
                request[moves], source[moves], target[moves] = b, root + child, place
                moves += 1
            at = child
            now[b] += 1
    return request[:moves], source[:moves], target[:moves], now


@compiled
def trie(ngrams: Any, nodes: int, limit: int, odds: Any, least: Any) -> Any:
    """Tokens, parents and chances [B, nodes] of `builders.trie`: ngrams [B, G, L], odds [B, G, L] float64."""
    batch, count, length = ngrams.shape
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    out_chance = np.zeros((batch, nodes))
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
                    out_chance[b, row] = chance[g, step]
                    row += 1
                    rows[g, step] = row
    return out_tokens, out_parents, out_chance


@compiled
def _same(ngrams: Any, g: Any, h: Any, length: Any) -> bool:
    """Whether two of the n-grams [G, L] have the same first `length` tokens."""
    step = 0
    while step < length and ngrams[g, step] == ngrams[h, step]:
        step += 1
    return step == length
