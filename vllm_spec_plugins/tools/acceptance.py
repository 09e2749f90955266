# SPDX-License-Identifier: Apache-2.0
"""How often the walk goes on, by how a node's children were chosen; with the engine's own noise, sampler and walk.

    python -m vllm_spec_plugins.tools.bench acceptance

No server and no model: p and q are random, q = similarity * p + (1 - similarity) * another distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.cpu.kernels.noise import gumbel_topk
from vllm_spec_plugins.cpu.kernels.sampling import draw
from vllm_spec_plugins.tree.accept import Walk
from vllm_spec_plugins.tree.builders import trie

# Vocabulary and similarity of each line.
LINES = ((50, 0.7), (500, 0.7), (500, 0.4))
CHILDREN = (1, 2, 4)
PAIRS = 12
SPREAD = 2.0  # standard deviation of the logits
_AT_ONCE = 2000


@dataclass(frozen=True)
class Chances:
    """The chance that the target's draw is among a node's children, for each number of CHILDREN.

    Attributes:
        coupled: children with the largest log q + noise, the noise that the target draws with.
        likeliest: the likeliest children of q.
        overlap: 1 - TV(p, q), what one child drawn from q reaches under the published rules.
        exact: the walk emitted the target's draw every time, whatever the children were.
    """

    vocab: int
    similarity: float
    coupled: tuple[float, ...]
    likeliest: tuple[float, ...]
    overlap: float
    exact: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pair(vocab: int, similarity: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random p and q, [V] float32."""
    p, other = (SPREAD * torch.randn(2, vocab, generator=rng)).softmax(1)
    return p, similarity * p + (1 - similarity) * other


def goes_on(p: Tensor, q: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor, bool]:
    """Shares of `samples` positions of one request at which a child was accepted, [len(CHILDREN)] each.

    Returns coupled, likeliest, and whether the walk emitted what the sampler drew.
    """
    widest = max(CHILDREN)
    temperature, seeds = torch.ones(1), torch.tensor([seed])
    given = q.topk(widest).indices.expand(_AT_ONCE, -1)
    hits, exact = torch.zeros(2, len(CHILDREN)), True
    for begin in range(0, samples, _AT_ONCE):
        position = torch.arange(begin, min(begin + _AT_ONCE, samples))
        count = len(position)
        rows = torch.zeros(count, dtype=torch.int64)
        logits = p.log().repeat(count, 1)
        drawn, _ = draw(logits, rows, temperature, seeds, position, apply_temperature=False, drafting=False, fp64=False)
        target = torch.from_numpy(drawn)
        drafts = q.log().repeat(count, 1).numpy()
        coupled = torch.from_numpy(
            gumbel_topk(drafts, np.ones(count, np.float32), np.full(count, seed), position.numpy(), widest)[0]
        )
        for which, children in enumerate((coupled, given[:count])):
            for column, k in enumerate(CHILDREN):
                emitted, accepted = _walk(children[:, :k], target)
                hits[which, column] += accepted
                exact &= emitted
    coupled_share, given_share = hits / samples
    return coupled_share, given_share, exact


def _walk(children: Tensor, target: Tensor) -> tuple[bool, int]:
    """Whether the walk emits `target` [n] first, and how often it finds it among `children` [n, K]."""
    drawn = torch.zeros(len(target), children.shape[1] + 1, dtype=torch.int64)  # below a child, any token
    drawn[:, 0] = target
    kept = Walk()(trie(children.unsqueeze(2), children.shape[1]), drawn)
    return torch.equal(kept.emitted[:, 0], target), int((kept.num_accepted > 0).sum())


def measure(
    samples: int, seed: int, lines: Sequence[tuple[int, float]] = LINES, say: Callable[[str], None] = lambda _: None
) -> list[Chances]:
    """One `Chances` per (vocabulary, similarity), the mean of PAIRS pairs of `samples` draws each."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for vocab, similarity in lines:
        coupled, likeliest = torch.zeros(2, len(CHILDREN))
        overlap, exact = 0.0, True
        for number in range(PAIRS):
            p, q = pair(vocab, similarity, rng)
            with_noise, given, right = goes_on(p, q, samples, seed + number)
            coupled, likeliest, exact = coupled + with_noise / PAIRS, likeliest + given / PAIRS, exact and right
            overlap += float(torch.minimum(p, q).sum()) / PAIRS
        found.append(Chances(vocab, similarity, tuple(coupled.tolist()), tuple(likeliest.tolist()), overlap, exact))
        say(f"vocabulary {vocab}, similarity {similarity}: done")
    return found
