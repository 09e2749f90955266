# SPDX-License-Identifier: Apache-2.0
"""Plain Python references for token trees: one request, lists, loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_spec_plugins.tree import TokenTree


def random_tree(rng: torch.Generator, batch: int, nodes: int, vocab: int, chainy: float = 0.3) -> TokenTree:
    """Trees of random shape and size; few token values, so that siblings are often duplicates."""
    tokens = torch.randint(vocab, (batch, nodes), generator=rng)
    rows = torch.arange(nodes)
    parents = (torch.rand(batch, nodes, generator=rng) * (rows + 1)).long()
    parents = torch.where(torch.rand(batch, nodes, generator=rng) < chainy, rows, parents)
    return TokenTree(tokens, parents).truncate(torch.randint(nodes + 1, (batch,), generator=rng))


def path_to(parents: list[int], row: int) -> list[int]:
    """Rows from the root (left out) down to `row`."""
    path: list[int] = []
    while row:
        path.insert(0, row)
        row = parents[row - 1]
    return path


def walk(tokens: list[int], parents: list[int], drawn: list[int]) -> tuple[list[int], list[int]]:
    """(rows, emitted) of the deepest walk that always goes to a child equal to the row's draw."""
    best: tuple[list[int], list[int]] = ([], [drawn[0]])
    frontier: list[tuple[int, list[int], list[int]]] = [(0, [], [])]
    while frontier:
        row, rows, emitted = frontier.pop(0)
        emitted = [*emitted, drawn[row]]
        if len(rows) > len(best[0]):
            best = (rows, emitted)
        for node, parent in enumerate(parents):
            if parent == row and tokens[node] == drawn[row] and tokens[node] >= 0:
                frontier.append((node + 1, [*rows, node + 1], emitted))
    return best


def typical(
    tokens: list[int], parents: list[int], p: list[list[float]], eps: float, delta: float
) -> tuple[list[int], int]:
    """(rows of the first of the longest paths of typical tokens, where it ends); p: the target's at every row."""
    best: list[int] = []
    for node in range(len(tokens)):
        path = path_to(parents, node + 1)
        right = tokens[node] >= 0
        for row in path:
            above = p[parents[row - 1]]
            entropy = -sum(x * math.log(x) for x in above if x > 0)
            right &= above[tokens[row - 1]] > min(eps, delta * math.exp(-entropy))
        if right and len(path) > len(best):
            best = path
    return best, best[-1] if best else 0


def paths(tree: TokenTree, request: int = 0) -> list[tuple[int, ...]]:
    """The token string of every node of one request, in node order."""
    tokens, parents = tree.tokens[request].tolist(), tree.parents[request].tolist()
    present = [node for node, token in enumerate(tokens) if token >= 0]
    return [tuple(tokens[row - 1] for row in path_to(parents, node + 1)) for node in present]


def unpad(values: Tensor) -> list[int]:
    return [value for value in values.tolist() if value >= 0]


def united(trees: list[TokenTree], weights: list[float], request: int) -> dict[tuple[int, ...], float]:
    """Chance of every path that some source's tree has: `tree.union`'s formula for one request."""
    odds: dict[tuple[int, ...], float] = {}
    for tree, weight in zip(trees, weights, strict=True):
        names, parents = paths(tree, request), tree.parents[request].tolist()
        chance = [1.0, *tree.chance[request].tolist()]
        given = [chance[node + 1] / chance[parents[node]] for node in range(len(names))]
        for node, path in enumerate(names):
            together = sum(given[other] for other in range(len(names)) if parents[other] == parents[node])
            odds[path] = odds.get(path, 0.0) + weight * given[node] / (1.0 - together)
    found = {(): 1.0}
    for path in sorted(odds, key=len):
        beside = sum(odds[other] for other in odds if other[:-1] == path[:-1])
        found[path] = found[path[:-1]] * odds[path] / (1.0 + beside)
    del found[()]
    return found
