# SPDX-License-Identifier: Apache-2.0
"""Deferral rules: where does the cheap stage's token stand, and where the full model's?

A rule scores every row of a verified tree and compares with a threshold; the larger the score, the safer the cheap token. q is
the cheap stage's distribution behind a row and p the full model's, both after temperature and filters; at temperature 0,
where these would be all on one token, both are those of temperature 1.

Narasimhan et al., "Faster Cascades via Speculative Decoding", arXiv 2405.19261: Chow's rule, the difference rule and the
token-specific rule there are `confidence`, `difference` and `top` here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.layers.exit_policy import ExitPolicy
from vllm_spec_plugins.layers.exits import policy
from vllm_spec_plugins.tree.accept import Acceptance, TargetRows, accept_without
from vllm_spec_plugins.tree.tree import TokenTree


@dataclass(frozen=True)
class DeferralRule(ABC):
    """A score and what it must reach.

    Attributes:
        bound: in the rule's own unit, as a user writes it.
        foresees: the score is known before the full model has run.
    """

    bound: float

    name: ClassVar[str]
    example: ClassVar[str]
    least: ClassVar[float]
    most: ClassVar[float]
    foresees: ClassVar[bool] = False

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The least score at which the cheap token stands."""

    @abstractmethod
    def score(self, confidence: Tensor, logits: Tensor, line: Tensor, tokens: Tensor) -> Tensor:
        """[B, N] float32.

        Args:
            confidence: [B, N] float32, what the cheap stage says of itself behind the row above each node.
            logits: [M, V], processed, of the full model.
            line: [B, N] int64, the logits of the row above each node.
            tokens: [B, N] int64, the nodes'.
        """

    def at(self, bound: float) -> DeferralRule:
        """The same rule with another bound. Raises ValueError, with a clause that says what would be valid."""
        if not (math.isfinite(bound) and self.least <= bound <= self.most):
            raise ValueError(f"{bound:g} is out of range for {self.name}; valid are {self.least:g} to {self.most:g}")
        return replace(self, bound=bound)

    def __str__(self) -> str:
        return f"{self.name}:{self.bound:g}"


class Confidence(DeferralRule):
    """max q >= bound: Chow's rule (1970). Above 1: never."""

    name, example, least, most = "confidence", "confidence:0.8", 0.0, 2.0
    foresees = True

    @property
    def threshold(self) -> float:
        return self.bound

    def score(self, confidence: Tensor, logits: Tensor, line: Tensor, tokens: Tensor) -> Tensor:
        return confidence


class Difference(DeferralRule):
    """max q >= max p - bound. At -1: never."""

    name, example, least, most = "difference", "difference:0.1", -1.0, 1.0

    @property
    def threshold(self) -> float:
        return -self.bound

    def score(self, confidence: Tensor, logits: Tensor, line: Tensor, tokens: Tensor) -> Tensor:
        return confidence - largest(logits)[line]


class Top(DeferralRule):
    """p(x) >= (1 - bound) max p for the cheap token x. At 0 x must be the full model's likeliest token."""

    name, example, least, most = "top", "top:0.5", 0.0, 1.0

    @property
    def threshold(self) -> float:
        return 1.0 - self.bound

    def score(self, confidence: Tensor, logits: Tensor, line: Tensor, tokens: Tensor) -> Tensor:
        return torch.exp(logits[line, tokens].float() - logits.amax(1).float()[line])


@dataclass(frozen=True)
class Exit(DeferralRule):
    """An early-exit policy on the shallow layers' answer (layers/exits.py), `bound` in the policy's unit."""

    policy: ExitPolicy

    name, example, least, most = "exit", "exit:margin:0.4", -math.inf, math.inf
    foresees = True

    @property
    def threshold(self) -> float:
        return self.policy.threshold

    def score(self, confidence: Tensor, logits: Tensor, line: Tensor, tokens: Tensor) -> Tensor:
        return confidence

    def at(self, bound: float) -> Exit:
        low, high = self.policy.least, self.policy.most
        if not (math.isfinite(bound) and low <= bound <= high):
            raise ValueError(f"{bound:g} is out of range for {self.policy.name}; valid are {low:g} to {high:g}")
        return replace(self, bound=bound, policy=replace(self.policy, bound=bound))

    def __str__(self) -> str:
        return f"{self.name}:{self.policy}"


RULES: dict[str, type[DeferralRule]] = {kind.name: kind for kind in (Confidence, Difference, Top, Exit)}


def deferral_rule(text: str, device: torch.device | str = "cpu") -> DeferralRule:
    """From the text of a setting: `confidence:0.8`, `difference:0.1`, `top:0.5`, `exit:margin:0.4`.

    Raises ValueError, with a clause that begins with the text and says what is wrong with it and what would be valid.
    """
    name, _, rest = text.partition(":")
    kind = RULES.get(name)
    if kind is None:
        raise ValueError(f"{text} is no deferral rule; valid are {', '.join(rule.example for rule in RULES.values())}")
    if kind is Exit:
        try:
            found = policy(rest, device)
        except ValueError as error:
            raise ValueError(f"{text} names an exit policy that cannot be used: {error}") from error
        return Exit(found.bound, found)
    try:
        bound = float(rest)
    except ValueError:
        bound = math.nan
    if not kind.least <= bound <= kind.most:
        raise ValueError(
            f"{text} has {rest!r} where a number of {kind.least:g} to {kind.most:g} belongs; write {kind.example}"
        )
    return kind(bound)


def largest(logits: Tensor) -> Tensor:
    """[M] float32: the largest probability of logits [M, V], which may hold -inf."""
    logits = logits.float()
    return 1.0 / torch.exp(logits - logits.amax(-1, keepdim=True)).sum(-1)


def first_children(tree: TokenTree) -> Tensor:
    """[B, N] bool: nodes that stand first below their parent, the cheap stage's own choice there."""
    if loops_for(tree.tokens):
        from vllm_spec_plugins.cascade import loops

        return torch.from_numpy(loops.first_children(tree.tokens.numpy(), tree.parents.numpy()))
    nodes, parents = tree.tokens.shape[1], tree.parents
    earlier = torch.ones(nodes, nodes, dtype=torch.bool, device=parents.device).tril(-1)
    return (tree.tokens >= 0) & ~((parents.unsqueeze(2) == parents.unsqueeze(1)) & earlier).any(2)


class Deferral:
    """The acceptance rule of a cascade: at each row the cheap stage's token stands where `rule` says so, else the full
    model's own draw; the path goes on below the token that stands, if it is a node.

    The cheap token is a row's first child. It never stands where the full model's logits rule it out (grammars, filters).
    Where it depends on p and q alone, and children are drawn from q, the text is a draw from q where the rule keeps and from p
    elsewhere. `TargetRows.threshold` has a threshold per request: inf keeps nothing, which is the walk.
    """

    name = "cascade"
    lossless = False
    needs_target = True
    coupled = True

    def __init__(self, rule: DeferralRule) -> None:
        self.rule = rule
        self.caveat = f"rule={rule} is lossy: text is not plain decoding's, of greedy requests neither"

    def __call__(self, tree: TokenTree, drawn: Tensor, target: TargetRows | None = None) -> Acceptance:
        assert target is not None and tree.confidence is not None
        line = target.index.gather(1, tree.parents).clamp(min=0)  # [B, N]
        tokens = tree.tokens.clamp(min=0)
        threshold = self.rule.threshold if target.threshold is None else target.threshold.unsqueeze(1)
        good = self.rule.score(tree.confidence, target.logits, line, tokens) >= threshold
        good &= target.logits[line, tokens] > -math.inf
        return accept_without(tree, refused(tree, good, drawn), drawn)


def refused(tree: TokenTree, good: Tensor, drawn: Tensor) -> Tensor:
    """[B, N] bool: nodes whose token does not stand behind their parent, given where first children are `good` [B, N]."""
    if loops_for(good):
        from vllm_spec_plugins.cascade import loops

        arrays = (each.numpy() for each in (tree.tokens, tree.parents, good, drawn))
        return torch.from_numpy(loops.refused(*arrays))
    present = (tree.tokens | drawn[:, 1:]) >= 0
    stands = first_children(tree) & good & present
    replaced = torch.zeros_like(drawn, dtype=torch.int32)  # [B, N + 1]: rows behind which the cheap token stands
    replaced.scatter_add_(1, tree.parents, stands.int())
    own = (tree.tokens == drawn.gather(1, tree.parents)) & (replaced.gather(1, tree.parents) == 0)
    return ~(stands | own) | ~present
