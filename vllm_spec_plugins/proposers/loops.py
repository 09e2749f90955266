# SPDX-License-Identifier: Apache-2.0
"""Proposers on the CPU: what history.py computes with tensors, as compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled


@compiled
def history_guesses(
    token_ids: Any, slots: Any, lengths: Any, guesses: int, length: int, searched: int, odds_of: Any
) -> Any:
    """`history.history_guesses`: ngrams int64 and odds float64, both [B, G, L].

    token_ids: [R, max_len] int32; odds_of: [G, LONGEST + 1] float64, the odds by rank and by tokens matched.
    """
    batch, longest = len(slots), odds_of.shape[1] - 1
    ngrams = np.full((batch, guesses, length), -1, dtype=np.int64)
    odds = np.zeros((batch, guesses, length))
    place, matched = np.empty(guesses, dtype=np.int64), np.empty(guesses, dtype=np.int64)
    for b in range(batch):
        text, end = token_ids[slots[b]], lengths[b]
        last, found, least = text[end - 1], 0, 1
        for at in range(end - 1, 0, -1):
            if text[at - 1] != last:
                continue
            count = 1
            while count < searched and count < at and text[at - 1 - count] == text[end - 1 - count]:
                count += 1
            # Among equals the more recent place, which comes first here, stays.
            if found == guesses and count <= least:
                continue
            rank = found if found < guesses else guesses - 1
            while rank > 0 and matched[rank - 1] < count:
                place[rank], matched[rank] = place[rank - 1], matched[rank - 1]
                rank -= 1
            place[rank], matched[rank] = at, count
            found = min(found + 1, guesses)
            least = matched[found - 1]
            if found == guesses and least == searched:
                break
        for rank in range(found):
            count = matched[rank]
            while count < longest and count < place[rank] and text[place[rank] - 1 - count] == text[end - 1 - count]:
                count += 1
            matched[rank] = count
        for rank in range(1, found):  # by length of the match, then by place: an insertion sort
            at, count, to = place[rank], matched[rank], rank
            while to > 0 and (matched[to - 1] < count or (matched[to - 1] == count and place[to - 1] < at)):
                place[to], matched[to] = place[to - 1], matched[to - 1]
                to -= 1
            place[to], matched[to] = at, count
        for rank in range(found):
            period = end - place[rank]
            for step in range(length):
                ngrams[b, rank, step] = text[place[rank] + step % period]
                odds[b, rank, step] = odds_of[rank, min(matched[rank] + step, longest)]
    return ngrams, odds


@compiled
def expand(
    chances: Any, owners: Any, tokens: Any, start: Any, count: Any, most: int, least: Any, drafted: Any, parents: Any,
    candidate: Any, rows: Any
) -> tuple[Any, Any]:  # fmt: skip
    """Give the draft the best candidates of the last level, `most` per request, none below `least`.

    Args:
        chances, owners, tokens: [B, C], candidates: chance of the path, row of the parent in the draft's tree, token.
        start, count: [B], where the last level begins and how many candidates there are; `start` is moved behind them.
        drafted, parents, candidate: [B, E], the draft's trees and which candidate each of their rows is; written.
        rows: [B], rows of each tree; written.

    Returns:
        request and row [M] of what was added, request by request.
    """
    batch = len(rows)
    request, row = np.empty(batch * most, dtype=np.int64), np.empty(batch * most, dtype=np.int64)
    added = 0
    for b in range(batch):
        for _ in range(min(most, drafted.shape[1] - rows[b])):
            best = -1
            for node in range(start[b], count[b]):
                if chances[b, node] >= least and chances[b, node] > 0:
                    taken = False
                    for other in range(rows[b]):
                        taken |= candidate[b, other] == node
                    if not taken and (best < 0 or chances[b, node] > chances[b, best]):
                        best = node
            if best < 0:
                break
            at = rows[b]
            drafted[b, at], parents[b, at], candidate[b, at] = tokens[b, best], owners[b, best], best
            rows[b] = at + 1
            request[added], row[added] = b, at + 1
            added += 1
        start[b] = count[b]
    return request[:added], row[:added]


@compiled
def adopt(
    request: Any, row: Any, found: Any, scores: Any, children: int, candidate: Any, chances: Any, owners: Any, tokens: Any,
    links: Any, count: Any
) -> None:  # fmt: skip
    """Enter the first `children` of each row's candidates `found` [M, K], with the softmax of their `scores` [M, K] as
    chances; row 0 is the root. `links` [B, C]: each candidate's parent among the candidates, from 1; 0 = root.
    """
    for m in range(len(request)):
        b, parent = request[m], 0
        path = np.float32(1.0)
        if row[m] > 0:
            parent = candidate[b, row[m] - 1] + 1
            path = chances[b, parent - 1]
        total = np.float32(0.0)
        for k in range(scores.shape[1]):
            total += np.exp(scores[m, k] - scores[m, 0])
        for k in range(children):
            at = count[b]
            tokens[b, at], links[b, at], owners[b, at] = found[m, k], parent, row[m]
            chances[b, at] = path * (np.exp(scores[m, k] - scores[m, 0]) / total)
            count[b] = at + 1


@compiled
def likeliest_nodes(tokens: Any, links: Any, chances: Any, count: Any, nodes: int, limit: int, least: Any) -> Any:
    """Tokens, parents, chances and candidates' numbers [B, nodes] of the best tree of at most `limit` candidates [B, C]."""
    batch = len(count)
    out_tokens, out_parents = np.full((batch, nodes), -1, dtype=np.int64), np.zeros((batch, nodes), dtype=np.int64)
    out_chance, chosen = np.zeros((batch, nodes), dtype=np.float32), np.zeros((batch, nodes), dtype=np.int64)
    place = np.zeros(tokens.shape[1] + 1, dtype=np.int64)
    for b in range(batch):
        order = np.argsort(-chances[b, : count[b]], kind="mergesort")
        for row in range(min(limit, nodes, count[b])):
            node = order[row]
            if not (chances[b, node] >= least and chances[b, node] > 0):
                break
            out_tokens[b, row], out_parents[b, row] = tokens[b, node], place[links[b, node]]
            out_chance[b, row], chosen[b, row] = chances[b, node], node
            place[node + 1] = row + 1
    return out_tokens, out_parents, out_chance, chosen
