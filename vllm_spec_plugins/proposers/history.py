# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: continuations of earlier occurrences of the text's own ending."""

from __future__ import annotations

import torch
from torch import Tensor


def history_guesses(
    token_ids: Tensor, slots: Tensor, lengths: Tensor, max_length: int, match: int, guesses: int, length: int
) -> Tensor:
    """What followed the most similar earlier places of each request's text, best first.

    A place is better when more of the tokens before it (up to `match`) equal the text's last tokens, and among equals
    when it is more recent. A continuation that reaches the end of the text goes on from its own beginning, as an
    overlapping copy does in LZ77: a loop of any period is continued to the full length.

    Args:
        token_ids: [R, max_len] integer; slots: [B]; lengths: [B]: token_ids[slot, :length] is the text.
        max_length: host-side upper bound of lengths.
        match: longest suffix compared, >= 1.
        guesses: G; length: L.

    Returns:
        [B, G, L] int64, -1 = no such guess.
    """
    span = min(max_length, token_ids.shape[1])
    text = token_ids[:, :span].index_select(0, slots)  # [B, T]
    batch, device = len(slots), text.device
    # same[:, p]: how many tokens before place p equal the text's ending, up to `match`.
    score = torch.zeros(batch, span, dtype=torch.int64, device=device)
    run: Tensor | None = None
    for back in range(1, min(match, span - 1) + 1):
        last = text.gather(1, (lengths - back).clamp_(min=0).unsqueeze(1))
        equal = text[:, : span - back] == last  # token p - back of place p, p = back .. span - 1
        run = equal if run is None else run[:, 1:] & equal
        score[:, back:] += run
    place = torch.arange(span, device=device)
    known = place < lengths.unsqueeze(1)  # the place just behind the text is the ending itself
    rank = (score * span + place).masked_fill(~known | (score == 0), -1)
    count = min(guesses, span)
    best, start = rank.topk(count, dim=1)  # [B, G]
    period = (lengths.unsqueeze(1) - start).clamp_(min=1).unsqueeze(2)
    index = start.unsqueeze(2) + torch.arange(length, device=device) % period  # [B, G, L]
    found = text.gather(1, index.view(batch, -1)).view(batch, count, length).long()
    found.masked_fill_((best < 0).unsqueeze(2), -1)
    return found if count == guesses else torch.nn.functional.pad(found, (0, 0, 0, guesses - count), value=-1)
