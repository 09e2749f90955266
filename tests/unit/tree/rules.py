# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules by exact enumeration: the output distribution of one node and its children.

Each rule gets the target's p, the draft's q and the children in order, and returns (distribution of the emitted
token, chance that a child was accepted). `enumerate_rule` averages over how the children were chosen.

The two published rules that need draft probabilities stand here a second time, for many nodes and real vocabularies:
`specinfer_accepts` and `rrsw_accepts`. They are references to compare with; the engine has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations, product
from math import prod

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, tuple[int, ...]], tuple[Tensor, float]]
Choice = Callable[[Tensor], Iterator[tuple[float, tuple[int, ...]]]]


def norm(x: Tensor) -> Tensor:
    return x / x.sum() if x.sum() > 0 else x


def without(x: Tensor, token: int) -> Tensor:
    return x.clone().index_fill_(0, torch.tensor([token]), 0.0)


# How children are chosen.


def independent(q: Tensor, count: int = 2) -> Iterator[tuple[float, tuple[int, ...]]]:
    """`count` draws from q."""
    for children in product(range(len(q)), repeat=count):
        yield prod(float(q[child]) for child in children), children


def without_replacement(q: Tensor, count: int = 2) -> Iterator[tuple[float, tuple[int, ...]]]:
    """`count` draws from q, each from what those before it left over."""
    for children in permutations(range(len(q)), count):
        rest, weight = q, 1.0
        for child in children:
            weight *= float(rest[child])
            rest = norm(without(rest, child))
        yield weight, children


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


# Many nodes at once: p and q [n, V]. Only what is random is drawn, sums over children are taken exactly.


def specinfer_accepts(p: Tensor, q: Tensor, count: int) -> Iterator[Tensor]:
    """After 1, 2 .. `count` independent children: [n, V], the chance that the token was one of them and accepted."""
    accepted, alive = torch.zeros_like(p), torch.ones_like(p[:, :1])
    for _ in range(count):
        common = torch.minimum(p, q)
        accepted = accepted + alive * common
        yield accepted
        alive = alive * (1 - common.sum(1, keepdim=True)).clamp(min=0)
        p = _norm_rows((p - q).clamp(min=0))


def rrsw_accepts(p: Tensor, q: Tensor, count: int, rng: torch.Generator) -> Iterator[Tensor]:
    """`specinfer_accepts` for children drawn without replacement; which ones were rejected before is drawn."""
    accepted, alive = torch.zeros_like(p), torch.ones_like(p[:, :1])
    for _ in range(count):
        common = torch.minimum(p, q)
        accepted = accepted + alive * common
        yield accepted
        alive = alive * (1 - common.sum(1, keepdim=True)).clamp(min=0)
        # A child that was rejected was drawn from q and not kept: its distribution is what q has beyond p.
        rejected = (q - p).clamp(min=1e-30).multinomial(1, generator=rng)
        p = _norm_rows((p - q).clamp(min=0))
        q = _norm_rows(q.scatter(1, rejected, 0.0))


def _norm_rows(x: Tensor) -> Tensor:
    return x / x.sum(1, keepdim=True).clamp(min=1e-30)
