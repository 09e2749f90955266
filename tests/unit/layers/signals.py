# SPDX-License-Identifier: Apache-2.0
"""Random signals of an exit."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spec_plugins.layers.exits import ExitSignals

HIDDEN = 16


def signals(rows: int, rng: torch.Generator, vocab: int = 50, layer: int = 4, earlier: int = 2) -> ExitSignals:
    """Of `rows` tokens; the answers before are often the one here."""
    logits = 3.0 * torch.randn(rows, vocab, generator=rng)
    others = torch.randint(vocab, (rows, earlier), generator=rng)
    same = torch.rand(rows, earlier, generator=rng) < 0.6
    hidden = torch.randn(rows, HIDDEN, generator=rng)
    return ExitSignals(
        layer=layer,
        tokens=torch.randint(vocab, (rows,), generator=rng),
        logits=logits,
        hidden=hidden,
        earlier=torch.where(same, logits.argmax(1, keepdim=True), others),
        earlier_hidden=hidden + 0.5 * torch.randn(rows, HIDDEN, generator=rng),
    )


def of_logits(logits: Tensor) -> ExitSignals:
    """Of logits [M, V] alone."""
    rows = len(logits)
    nothing = torch.zeros(rows, dtype=torch.int64)
    return ExitSignals(2, nothing, logits, torch.zeros(rows, HIDDEN), nothing.new_zeros(rows, 0))
