# SPDX-License-Identifier: Apache-2.0
"""Topologies: tree shapes that are known before any token is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_spec_plugins.tree.tree import TokenTree


@dataclass(frozen=True)
class Topology:
    """A fixed tree shape. Its derived tensors are computed once per device and shared by all trees of the shape.

    Attributes:
        parents: row of each node's parent (0 = root), ancestors first.
        ranks: which child of its parent a node is, 0 = the best. A proposer with ranked candidates per depth
            (Medusa, draft models) puts candidate `ranks[j]` of depth `depths[j]` at node j.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    _shared: dict[torch.device, TokenTree] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.ranks):
            raise ValueError(f"{len(self.parents)} parents but {len(self.ranks)} ranks")
        if any(not 0 <= parent <= node for node, parent in enumerate(self.parents)):
            raise ValueError(f"parents must come before their children: {self.parents}")
        if len(set(zip(self.parents, self.ranks, strict=True))) < len(self.parents):
            raise ValueError("two children of one parent have the same rank")

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; children of the root are at 1."""
        depth = [0]
        for parent in self.parents:
            depth.append(depth[parent] + 1)
        return tuple(depth[1:])

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)

    def tree(self, tokens: Tensor) -> TokenTree:
        """Trees of this shape with `tokens` [B, num_nodes] int64; -1 may stand at the end only."""
        shared = self._shared.get(tokens.device)
        if shared is None:
            parents = torch.tensor([self.parents], dtype=torch.int64, device=tokens.device)
            shared = TokenTree(torch.zeros_like(parents), parents, self.max_depth)
            self._shared[tokens.device] = shared
        return shared.like(tokens)


def chain_topology(length: int) -> Topology:
    """`length` nodes, each the child of the one before."""
    return Topology(tuple(range(length)), (0,) * length)


def widths(expansion: Sequence[int]) -> Topology:
    """SpecInfer's expansion vector <k1..km> (arXiv 2305.09781, section 3): every node at depth i has k_{i+1} children.

    Level by level, the best children of the best parents first.
    """
    if any(k < 1 for k in expansion):
        raise ValueError(f"expansion widths must be positive, got {list(expansion)}")
    parents: list[int] = []
    ranks: list[int] = []
    level = [0]
    for k in expansion:
        start = len(parents) + 1
        parents += [row for row in level for _ in range(k)]
        ranks += [rank for _ in level for rank in range(k)]
        level = list(range(start, len(parents) + 1))
    return Topology(tuple(parents), tuple(ranks))


def from_choices(choices: Iterable[Sequence[int]]) -> Topology:
    """Medusa's tree choices (arXiv 2401.10774, section 2.1.2): each a path of ranks, (0, 2) = the best token of
    head 1, then the third of head 2.

    Nodes stand in the order given, but none before its parent. Raises ValueError when a choice's prefix is missing.
    """
    paths = dict.fromkeys(tuple(choice) for choice in choices)
    rows: dict[tuple[int, ...], int] = {(): 0}
    for path in paths:
        if path == () or (path[:-1] and path[:-1] not in paths) or min(path) < 0:
            raise ValueError(
                f"choice {list(path)} is not a path of ranks whose prefix {list(path[:-1])} is a choice too"
            )
    for path in paths:
        for length in range(1, len(path) + 1):
            rows.setdefault(path[:length], len(rows))
    del rows[()]
    return Topology(tuple(rows.get(path[:-1], 0) for path in rows), tuple(path[-1] for path in rows))


def lookahead_window(window: int, ngram: int) -> Topology:
    """The two-dimensional window of lookahead decoding (arXiv 2402.02057, section 3.3) as a tree.

    ngram - 1 rows of `window` columns; cell (0, 0) is the root. Cell (r, i) is row r * window + i of the tree and
    stands r + i tokens behind the root. It sees the window's row 0 up to column i and column i of the rows above it:
    parent(0, i) = (0, i - 1), parent(r, i) = (r - 1, i).
    """
    if window < 1 or ngram < 2:
        raise ValueError(f"a lookahead window needs window >= 1 and ngram >= 2, got {window} and {ngram}")
    parents = list(range(window - 1)) + list(range((ngram - 2) * window))
    # Cells (0, i) but the last have two children: (0, i + 1) is rank 0 and (1, i) rank 1.
    ranks = [0] * (window - 1) + [1] * (window - 1) + [0] * ((ngram - 2) * window)
    return Topology(tuple(parents), tuple(ranks[: len(parents)]))
