# SPDX-License-Identifier: Apache-2.0
"""One tree from several sources' on the CPU: what union.py and calibration.py compute with tensors, as compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled


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
