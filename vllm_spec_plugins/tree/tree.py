# SPDX-License-Identifier: Apache-2.0
"""TokenTree: which tokens might come next.

A tree has one root, the last sampled token, and up to N nodes below it. Row 0 is the root; node j is row j + 1.
A node is a token and the row of its parent, parents come before their children, and absent nodes (token -1)
stand at the end: any prefix of the nodes is again a tree, so a scheduler may cut drafts from the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import loops_for


@lru_cache(maxsize=16)
def _bit_values(device: torch.device) -> Tensor:
    return torch.ones(64, dtype=torch.int64, device=device) << torch.arange(64, device=device)


def as_words(bits: Tensor) -> Tensor:
    """[..., ceil(n / 64)] int64: bits [..., n] bool as words, bit j in bit j % 64 of word j // 64."""
    count = bits.shape[-1]
    words = -(-count // 64)
    if words * 64 > count:
        bits = torch.nn.functional.pad(bits, (0, words * 64 - count))
    return (bits.unflatten(-1, (words, 64)) * _bit_values(bits.device)).sum(-1)


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A batch of token trees of one fixed shape.

    Everything derived is computed on the device of `tokens`, without a host synchronisation, once, when first
    asked for. Derived values of absent nodes mean nothing (they hang below the root).

    Args:
        tokens: [B, N] int64; -1 = no node.
        parents: [B, N] int64, row of the parent (0 = root) with parents[:, j] <= j; 0 for absent nodes.
        max_depth: no node lies deeper than this; -1 = N. It sets the width of `path` and the work of `ancestors`.
        gain: [B] float, how many nodes the proposer expects to be accepted; None = the sum of `chance`, or it cannot say.
        chance: [B, N] float, the chance of each node to be accepted, never above its parent's; 0 for absent nodes; None =
            the proposer cannot say.
        confidence: [B, N] float, how sure the proposer was behind the row above each node; for rules that read it.
    """

    tokens: Tensor
    parents: Tensor
    max_depth: int = -1
    gain: Tensor | None = None
    chance: Tensor | None = None
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        if self.max_depth < 0:
            object.__setattr__(self, "max_depth", self.tokens.shape[1])
        if self.gain is None and self.chance is not None:
            object.__setattr__(self, "gain", self.chance.sum(1))

    @classmethod
    def empty(cls, batch: int, nodes: int, device: torch.device | str = "cpu", max_depth: int = -1) -> TokenTree:
        """Trees of no node at all: plain decoding."""
        return cls(
            torch.full((batch, nodes), -1, dtype=torch.int64, device=device),
            torch.zeros(batch, nodes, dtype=torch.int64, device=device),
            max_depth,
        )

    def like(self, tokens: Tensor) -> TokenTree:
        """Trees of the shape of this one ([1, N] or [B, N]) with other `tokens` [B, N], sharing its derived values."""
        batch = tokens.shape[0]
        tree = TokenTree(tokens, self.parents.expand(batch, -1).masked_fill(tokens < 0, 0), self.max_depth)
        tree.__dict__["_ancestors"] = self._ancestors.expand(batch, -1, -1)
        tree.__dict__["_ancestor_words"] = self._ancestor_words.expand(batch, -1, -1)
        tree.__dict__["depth"] = self.depth.expand(batch, -1)
        return tree

    @cached_property
    def num_nodes(self) -> Tensor:
        """[B] int64: nodes present."""
        return (self.tokens >= 0).sum(1)

    @cached_property
    def depth(self) -> Tensor:
        """[B, N + 1] int64: 0 for the root."""
        if loops_for(self.parents):
            from vllm_spec_plugins.tree import loops

            return torch.from_numpy(loops.depths(self.parents.numpy()))
        return self.ancestors().sum(-1) - 1

    def ancestors(self) -> Tensor:
        """[B, N + 1, N + 1] bool: [b, i, j] is true when row j lies on the path from the root to row i, i included."""
        return self._ancestors

    @cached_property
    def _ancestors(self) -> Tensor:
        if loops_for(self.parents):
            from vllm_spec_plugins.tree import loops

            return torch.from_numpy(loops.ancestors(self.parents.numpy()))
        batch, nodes = self.tokens.shape
        reach = torch.eye(nodes + 1, device=self.tokens.device).repeat(batch, 1, 1)
        reach[:, 1:].scatter_(2, self.parents.long().unsqueeze(2), 1.0)
        # reach = I + P; its powers count the ways up, at most C(2^k, 2^(k-1)): seven squarings fit a float32.
        for k in range((max(self.max_depth, 1) - 1).bit_length()):
            reach = reach @ reach
            if k >= 6:
                reach.clamp_(max=1.0)
        return reach > 0

    def ancestor_words(self) -> Tensor:
        """[B, N + 1, ceil((N + 1) / 64)] int64: row i of `ancestors` as bits, row j in bit j % 64 of word j // 64."""
        return self._ancestor_words

    @cached_property
    def _ancestor_words(self) -> Tensor:
        return as_words(self.ancestors())

    def path(self, row: Tensor) -> Tensor:
        """[B, max_depth] int64: the rows from the root (left out) down to `row` [B], padded with 0."""
        if loops_for(row):
            from vllm_spec_plugins.tree import loops

            return torch.from_numpy(loops.paths(self.parents.numpy(), self.depth.numpy(), row.numpy(), self.max_depth))
        batch, rows = self.depth.shape
        on_path = self.ancestors().gather(1, row.view(batch, 1, 1).expand(batch, 1, rows)).squeeze(1)
        # Depth tells each row of the path its place; all others fall into a column that is cut off.
        place = self.depth.masked_fill(~on_path, self.max_depth + 1)
        out = torch.zeros(batch, self.max_depth + 2, dtype=torch.int64, device=row.device)
        index = torch.arange(rows, device=row.device).expand(batch, rows)
        return out.scatter_(1, place, index)[:, 1 : self.max_depth + 1]

    def truncate(self, nodes: int | Tensor) -> TokenTree:
        """The first `nodes` (one number, or [B]) nodes of each tree; shapes stay."""
        limit = nodes.unsqueeze(1) if isinstance(nodes, Tensor) else nodes
        cut = torch.arange(self.tokens.shape[1], device=self.tokens.device) >= limit
        gain, chance = self.gain, self.chance
        if gain is not None and chance is not None:
            gain, chance = gain - (chance * cut).sum(1), chance.masked_fill(cut, 0.0)
        tokens, parents = self.tokens.masked_fill(cut, -1), self.parents.masked_fill(cut, 0)
        return TokenTree(tokens, parents, self.max_depth, gain, chance, self.confidence)

    def validate(self) -> None:
        """Raise ValueError unless this is a packed, ancestors-first tree. Synchronises: for tests and debugging."""
        nodes = self.tokens.shape[1]
        if self.tokens.shape != self.parents.shape or self.tokens.dim() != 2:
            raise ValueError(f"tokens {tuple(self.tokens.shape)} and parents {tuple(self.parents.shape)} differ")
        present = self.tokens >= 0
        if bool((self.tokens < -1).any()):
            raise ValueError("token ids below -1")
        if bool((present[:, 1:] & ~present[:, :-1]).any()):
            raise ValueError("absent nodes must stand at the end")
        if bool(((self.parents < 0) | (self.parents > torch.arange(nodes, device=self.parents.device))).any()):
            raise ValueError("a parent must be a row before its child")
        if bool((self.parents[~present] != 0).any()):
            raise ValueError("absent nodes must have parent 0")
        exact = TokenTree(self.tokens, self.parents).depth
        if nodes and int(exact.max()) > self.max_depth:
            raise ValueError(f"depth {int(exact.max())} exceeds max_depth {self.max_depth}")
