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
