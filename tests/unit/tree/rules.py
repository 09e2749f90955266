# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules by exact enumeration: the output distribution of one node with two children.

Each rule gets the target's p, the draft's q and the children in order, and returns (distribution of the emitted
token, chance that a child was accepted). `enumerate_rule` averages over how the children were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, tuple[int, ...]], tuple[Tensor, float]]
Choice = Callable[[Tensor], Iterator[tuple[float, tuple[int, ...]]]]


def norm(x: Tensor) -> Tensor:
    return x / x.sum() if x.sum() > 0 else x


def without(x: Tensor, token: int) -> Tensor:
    return x.clone().index_fill_(0, torch.tensor([token]), 0.0)


# How children are chosen.


def independent(q: Tensor) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Two draws from q."""
    for a, b in product(range(len(q)), repeat=2):
        yield float(q[a] * q[b]), (a, b)


def without_replacement(q: Tensor) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Two draws from q, the second from what the first left over."""
    for a in range(len(q)):
        rest = norm(without(q, a))
        for b in range(len(q)):
            if b != a:
                yield float(q[a] * rest[b]), (a, b)


def best_two(q: Tensor) -> Iterator[tuple[float, tuple[int, ...]]]:
    """The two likeliest tokens: nothing is drawn."""
    yield 1.0, tuple(q.topk(2).indices.tolist())


# How a child is accepted. All share one loop: accept the child with some chance, else go on with what p has left.


def _children_in_turn(
    p: Tensor, q: Tensor, children: tuple[int, ...], chance: Callable, residual: Callable, next_q: Callable
) -> tuple[Tensor, float]:
    out, alive, accepted = torch.zeros_like(p), 1.0, 0.0
    for child in children:
        accept = float(chance(p, q, child))
        out[child] += alive * accept
        accepted += alive * accept
        alive *= 1 - accept
        p, q = residual(p, q, child), next_q(q, child)
    return out + alive * p, accepted


def _ratio(p: Tensor, q: Tensor, x: int) -> float:
    return min(1.0, float(p[x] / q[x])) if q[x] > 0 else 0.0


def _minus_q(p: Tensor, q: Tensor, x: int) -> Tensor:
    return norm((p - q).clamp(min=0))


def multi_step(p: Tensor, q: Tensor, children: tuple[int, ...]) -> tuple[Tensor, float]:
    """SpecInfer's multi-step speculative sampling."""
    return _children_in_turn(p, q, children, _ratio, _minus_q, lambda q, x: q)


def recursive_rejection(p: Tensor, q: Tensor, children: tuple[int, ...]) -> tuple[Tensor, float]:
    """Recursive rejection sampling without replacement: q is renormalised after each draw."""
    return _children_in_turn(p, q, children, _ratio, _minus_q, lambda q, x: norm(without(q, x)))


def one_hot(p: Tensor, q: Tensor, children: tuple[int, ...]) -> tuple[Tensor, float]:
    """A given child is accepted with its own probability."""
    return _children_in_turn(p, q, children, lambda p, q, x: p[x], lambda p, q, x: norm(without(p, x)), lambda q, x: q)


def wrong_not_renormalised(p: Tensor, q: Tensor, children: tuple[int, ...]) -> tuple[Tensor, float]:
    """WRONG: children drawn without replacement, q as if they had been drawn from the whole of it."""
    return _children_in_turn(p, q, children, _ratio, _minus_q, lambda q, x: without(q, x))


def enumerate_rule(p: Tensor, q: Tensor, choice: Choice, rule: Rule) -> tuple[float, float]:
    """(largest deviation of the emitted token's distribution from p, chance to accept a child)."""
    out, accepted = torch.zeros_like(p), 0.0
    for weight, children in choice(q):
        dist, hit = rule(p, q, children)
        out += weight * dist
        accepted += weight * hit
    return float((out - p).abs().max()), accepted
