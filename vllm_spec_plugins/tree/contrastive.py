# SPDX-License-Identifier: Apache-2.0
"""Contrastive search (Su et al., "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def directions(hidden: Tensor) -> Tensor:
    """[n, H] float32: hidden states [n, H] at unit length, so that their products are cosines."""
    return normalize(hidden.float(), dim=-1)


def candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each line of logits [n, V], best first: ids [n, K] int64 and p [n, K] float32."""
    # Of the logits, not of p: rounding makes equal probabilities of different logits.
    top, tokens = logits.float().topk(count, dim=-1)
    return tokens, torch.exp(top - logits.float().logsumexp(-1, keepdim=True))


def choose(p: Tensor, hidden: Tensor, context: Tensor, alpha: float) -> Tensor:
    """The candidate v with the largest (1 - alpha) * p(v) - alpha * max_j cos(h_v, h_j), the likeliest of equal ones.

    Args:
        p: [K] float32, what the model gives each candidate, best first.
        hidden: [K, H], the last hidden state of each candidate's row.
        context: [n, H] float32, `directions` of the rows of all tokens before.

    Returns [] int64.
    """
    likeness = (directions(hidden) @ context.T).amax(1)
    return ((1 - alpha) * p - alpha * likeness).argmax()
