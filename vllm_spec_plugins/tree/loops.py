# SPDX-License-Identifier: Apache-2.0
"""Trees on the CPU: what tree.py, accept.py and builders.py compute with tensors, as compiled loops.

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


@compiled
def forest_odds(tokens: Any, parents: Any, chance: Any, source: Any, most: Any) -> Any:
    """[B, M] float64: `Forest.odds` from path chances [B, M] float64; source [M]; most: `union.MOST`."""
    batch, nodes = tokens.shape
    odds = np.zeros((batch, nodes))
    total = np.empty(nodes + 1)  # of a node's children
    for b in range(batch):
        total[:] = 0.0
        for node in range(nodes):
            if node == 0 or source[node] != source[node - 1]:
                total[0], first = 0.0, node
            parent = parents[b, node]
            above = chance[b, parent - 1] if parent else 1.0
            if tokens[b, node] >= 0 and above > 0.0:
                odds[b, node] = chance[b, node] / above
                total[parent] += odds[b, node]
            if node + 1 == nodes or source[node + 1] != source[node]:
                for own in range(first, node + 1):
                    odds[b, own] /= 1.0 - min(total[parents[b, own]], most)
    return odds


@compiled
def union(tokens: Any, parents: Any, odds: Any, source: Any, weights: Any, nodes: Any, limit: Any, least: Any) -> Any:
    """Tokens, parents and chances [B, nodes] of `union.union`: a forest [B, M], weights [B, S] float64."""
    batch, many = tokens.shape
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    out_chance = np.zeros((batch, nodes))
    same, above = np.empty(many + 1, dtype=np.int64), np.empty(many + 1, dtype=np.int64)  # rows that stand for a path
    agree, total, chance = np.empty(many + 1), np.empty(many + 1), np.empty(many + 1)
    row = np.empty(many + 1, dtype=np.int64)
    kept = np.empty(many, dtype=np.bool_)
    same[0] = row[0] = 0
    for b in range(batch):
        agree[:], total[:] = 0.0, 0.0
        for node in range(many):
            at = node + 1
            same[at], above[at] = at, -1
            if tokens[b, node] < 0:
                continue
            above[at] = same[parents[b, node]]
            for other in range(node):
                if tokens[b, other] == tokens[b, node] and above[other + 1] == above[at]:
                    same[at] = same[other + 1]
                    break
            here = odds[b, node] * weights[b, source[node]]
            agree[same[at]] += here
            total[above[at]] += here
        chance[0] = 1.0
        worth = np.full(many, 1.0)  # negated, to sort the best to the front; what is no node goes to the back
        for node in range(many):
            at = node + 1
            if tokens[b, node] >= 0 and same[at] == at:
                chance[at] = chance[above[at]] * (agree[at] / (1.0 + total[above[at]]))
                worth[node] = -chance[at]
        kept[:] = False
        best = np.argsort(worth, kind="mergesort")
        for rank in range(min(limit, many)):
            kept[best[rank]] = worth[best[rank]] <= -max(least, 0.0)
        count = 0
        for node in range(many):
            if kept[node]:
                out_tokens[b, count], out_parents[b, count] = tokens[b, node], row[above[node + 1]]
                out_chance[b, count] = chance[node + 1]
                count += 1
                row[node + 1] = count
    return out_tokens, out_parents, out_chance


@compiled
def observe(
    slots: Any,
    token_ids: Any,
    lengths: Any,
    emitted: Any,
    tokens: Any,
    parents: Any,
    odds: Any,
    source: Any,
    offered_at: Any,
    counts: Any,
    max_depth: Any,
    memory: Any,
) -> None:
    """`Calibration.observe`, in place: forests [R, M] offered at [R], counts [R + 1, S, 3] float64; slots, lengths and
    emitted [B], token_ids [R, max_len].
    """
    nodes, sources = tokens.shape[1], counts.shape[1]
    right, depth = np.empty(nodes + 1, dtype=np.bool_), np.zeros(nodes + 1, dtype=np.int64)
    total, hit = np.empty((sources, max_depth)), np.empty((sources, max_depth), dtype=np.bool_)
    new, together = np.empty((sources, 3)), np.zeros((sources, 3))
    right[0] = True
    for b in range(len(slots)):
        slot, known = slots[b], lengths[b] - emitted[b]
        count = min(emitted[b], max_depth, token_ids.shape[1] - known) if offered_at[slot] == known else 0
        offered_at[slot] = -1
        total[:], hit[:], new[:] = -1.0, False, 0.0
        for node in range(nodes if count else 0):
            at = depth[parents[slot, node]]
            depth[node + 1] = at + 1
            right[node + 1] = False
            if tokens[slot, node] < 0 or at >= count or not right[parents[slot, node]]:
                continue
            right[node + 1] = tokens[slot, node] == token_ids[slot, known + at]
            total[source[node], at] = max(total[source[node], at], 0.0) + odds[slot, node]
            hit[source[node], at] |= right[node + 1]
        for each in range(sources):
            for at in range(count):
                if total[each, at] >= 0.0:
                    new[each, 0] += 1.0
                    new[each, 1] += total[each, at] / (1.0 + total[each, at])
                    new[each, 2] += hit[each, at]
            kept = memory if new[each, 0] > 0.0 else 1.0
            for figure in range(3):
                counts[slot, each, figure] = counts[slot, each, figure] * kept + new[each, figure]
                together[each, figure] += new[each, figure]
    for each in range(sources):
        kept = memory if together[each, 0] > 0.0 else 1.0
        for figure in range(3):
            counts[-1, each, figure] = counts[-1, each, figure] * kept + together[each, figure]


@compiled
def factors(slots: Any, counts: Any, prior: Any, extreme: Any) -> Any:
    """[B, S] float64: `Calibration.factors`."""
    found = np.empty((len(slots), counts.shape[1]))
    for each in range(counts.shape[1]):
        places, promised, right = counts[-1, each]
        general = promised / places if places > 0.0 else 0.5
        overall = _factor(general, (right + prior * general) / (places + prior), extreme)
        for b in range(len(slots)):
            places, promised, right = counts[slots[b], each]
            promise = promised / places if places > 0.0 else general
            expected = promise * overall / (1.0 - promise + promise * overall)
            found[b, each] = _factor(promise, (right + prior * expected) / (places + prior), extreme)
    return found


@compiled
def _factor(promise: Any, share: Any, extreme: Any) -> float:
    promise, share = min(max(promise, extreme), 1.0 - extreme), min(max(share, extreme), 1.0 - extreme)
    return share * (1.0 - promise) / (promise * (1.0 - share))
