# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what followed earlier occurrences of the text's own ending, and how likely it is to follow again."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for, loops_for

# Chance that the next token repeats, by how many tokens before it repeat already (0, 1, ..). Held-out source code,
# 16,000 positions, best match of each: .25 .50 .66 .72 .77 .82 .85 .80 .83, and .85 to .9 from there to 16 and on.
# A guess goes along the table as it gets longer: found with two equal tokens it has .50, then .65, then .72 ...
REPEATS = (0.0, 0.25, 0.5, 0.65, 0.72, 0.77, 0.8, 0.82, 0.84, 0.85, 0.86, 0.87, 0.88, 0.89, 0.9)
LONGEST = len(REPEATS) - 1
SEARCHED = 3  # tokens of the ending that the whole text is searched for; the places found are compared up to LONGEST
LATER = 0.7  # factor on the odds of each further place: occurrences of one text are not independent evidence


@lru_cache(maxsize=32)
def _odds(guesses: int, device: torch.device) -> Tensor:
    """[G, LONGEST + 1]"""
    chance = torch.tensor(REPEATS, device=device)
    return chance / (1 - chance) * LATER ** torch.arange(guesses, device=device).unsqueeze(1)


@lru_cache(maxsize=32)
def _range(start: int, end: int, device: torch.device) -> Tensor:
    return torch.arange(start, end, device=device)


def history_guesses(
    token_ids: Tensor, slots: Tensor, lengths: Tensor, max_length: int, guesses: int, length: int
) -> tuple[Tensor, Tensor]:
    """What followed the most similar earlier places of each request's text, the most similar first.

    A place is the more similar the more of the tokens before it equal the text's last ones; among equals the more
    recent is taken. A continuation that reaches the end of the text goes on from its own beginning, as an
    overlapping copy does in LZ77: a loop of any period is continued to the full length.

    Args:
        token_ids: [R, max_len] integer; slots: [B]; lengths: [B] >= 1: token_ids[slot, :length] is the text.
        max_length: host-side upper bound of lengths.
        guesses: G; length: L.

    Returns:
        guesses [B, G, L] int64, all -1 where there is none; odds [B, G, L] float that a token is right if those
        before it are.
    """
    if loops_for(token_ids):
        from vllm_spec_plugins.proposers import loops

        odds_of = _odds(guesses, token_ids.device).double().numpy()
        found = loops.history_guesses(
            token_ids.numpy(), slots.numpy(), lengths.numpy(), guesses, length, SEARCHED, odds_of
        )
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])
    if kernels_for(token_ids):
        from vllm_spec_plugins.kernels import history

        odds = _odds(guesses, token_ids.device)
        return history.history_guesses(token_ids, slots, lengths, max_length, guesses, length, SEARCHED, odds)
    span = min(max_length, token_ids.shape[1])
    text = token_ids[:, :span].index_select(0, slots)  # [B, T]
    batch, device = len(slots), text.device
    back = _range(1, LONGEST + 1, device)
    ending = text.gather(1, (lengths.unsqueeze(1) - back).clamp_(min=0))  # [B, LONGEST], the last token first

    # Place p is found with as many tokens as equal the ending at p - 1, p - 2, ..: counted up to SEARCHED.
    found = torch.zeros(batch, span, dtype=torch.int32, device=device)
    run = torch.ones(batch, span, dtype=torch.bool, device=device)
    for step in range(1, min(SEARCHED, span - 1) + 1):
        run = run[:, 1:] & (text[:, : span - step] == ending[:, step - 1 : step])
        found[:, step:] += run
    place = torch.arange(span, dtype=torch.int32, device=device)
    # The place behind the text is the ending itself.
    rank = (found * span + place).masked_fill_(place >= lengths.unsqueeze(1), -1)
    best, start = rank.topk(min(guesses, span), dim=1)  # [B, G]
    if span < guesses:
        best = torch.nn.functional.pad(best, (0, guesses - span), value=-1)
        start = torch.nn.functional.pad(start, (0, guesses - span))

    at = start.unsqueeze(2) - back  # [B, G, LONGEST]
    before = text.gather(1, at.clamp(min=0).view(batch, -1)).view_as(at)
    matched = ((before == ending.unsqueeze(1)) & (at >= 0)).cumprod(2).sum(2) * (best >= span)
    order = (matched * span + start).sort(dim=1, descending=True).values
    matched, start = order // span, order % span

    period = (lengths.unsqueeze(1) - start).clamp_(min=1).unsqueeze(2)  # below 1 only where nothing was found
    ahead = _range(0, length, device)
    index = (start.unsqueeze(2) + ahead % period).view(batch, -1)
    ngrams = text.gather(1, index).view(batch, guesses, length).long()
    ngrams.masked_fill_(matched.unsqueeze(2) == 0, -1)
    rank = _range(0, guesses, device).unsqueeze(1)
    return ngrams, _odds(guesses, device)[rank, (matched.unsqueeze(2) + ahead).clamp_(max=LONGEST)]
