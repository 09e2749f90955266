# SPDX-License-Identifier: Apache-2.0
"""Which stage serves a request: `cheap` and the rule as the only escape, `full`, or, measured while serving, `auto`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_spec_plugins.cascade.rules import DeferralRule, first_children
from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.tree.accept import Acceptance
from vllm_spec_plugins.tree.tree import TokenTree

ROUTES = ("auto", "cheap", "full")


class Routes:
    """Routes by request slot, on the device; the same on every tensor-parallel rank.

    A request of route `auto` is served as `cheap` while it is easy: the cheap stage's first choice was the full model's draw
    in at least `easy` of its recent rows. Else it is served as `full`, its rows are compared all the same, and it
    may come back.

    Args:
        max_requests: R.
        route: of requests that do not say.
    """

    MEMORY = 0.95  # per row
    PRIOR = 4.0  # rows' worth of belief that a request is easy

    def __init__(
        self, rule: DeferralRule, max_requests: int, route: str, easy: float, device: torch.device | str = "cpu"
    ) -> None:
        self.rule, self.route, self.least = rule, route, easy
        self.threshold = torch.full((max_requests,), math.inf, dtype=torch.float32, device=device)
        self.auto = torch.zeros(max_requests, dtype=torch.bool, device=device)
        nothing = torch.zeros(max_requests, dtype=torch.float32, device=device)
        self.judged, self.agreed, self.kept = nothing, nothing.clone(), nothing.clone()

    def add(self, slot: int, route: str | None = None, bound: float | None = None) -> None:
        """A request moves into `slot`; `bound` in place of the rule's."""
        route = route or self.route
        rule = self.rule if bound is None else self.rule.at(bound)
        self.threshold[slot] = math.inf if route == "full" else rule.threshold
        self.auto[slot] = route == "auto"
        self.judged[slot] = self.agreed[slot] = self.kept[slot] = 0.0

    def easy(self, slots: Tensor) -> Tensor:
        """[B] bool; True of all that are not `auto`."""
        enough = self.agreed[slots] + self.PRIOR >= self.least * (self.judged[slots] + self.PRIOR)
        return enough | ~self.auto[slots]

    def thresholds(self, slots: Tensor) -> Tensor:
        """[B] float32, `TargetRows.threshold`: inf where nothing of the cheap stage's is kept."""
        return self.threshold[slots].masked_fill(~self.easy(slots), math.inf)

    def stands(self, confidence: Tensor, slots: Tensor) -> Tensor:
        """[M] float32: the chance that the cheap token stands behind rows of requests in `slots` [M] though it is not drawn,
        known or from the request's recent rows.
        """
        threshold = self.thresholds(slots)
        if self.rule.foresees:
            return (confidence >= threshold).float()
        share = (self.kept[slots] + 1.0) / (self.judged[slots] - self.agreed[slots] + 2.0)
        return share.masked_fill(threshold == math.inf, 0.0)

    def observe(self, slots: Tensor, tree: TokenTree, drawn: Tensor, acceptance: Acceptance) -> None:
        """Compare the cheap stage's choices with the draws [B, N + 1] along the accepted paths."""
        judged, agreed, kept = compare(tree, drawn, acceptance)
        fade = self.MEMORY**judged
        self.judged[slots] = self.judged[slots] * fade + judged
        self.agreed[slots] = self.agreed[slots] * fade + agreed
        self.kept[slots] = self.kept[slots] * fade + kept


def compare(tree: TokenTree, drawn: Tensor, acceptance: Acceptance) -> tuple[Tensor, Tensor, Tensor]:
    """[B] int64 each: rows from the root down the accepted path with a child, those whose first child was drawn, and those
    whose first child was accepted though it was not.
    """
    if loops_for(drawn):
        from vllm_spec_plugins.cascade import loops

        arrays = (tree.tokens, tree.parents, drawn, acceptance.path, acceptance.num_accepted)
        judged, agreed, kept = loops.compare(*(each.numpy() for each in arrays))
        return torch.from_numpy(judged), torch.from_numpy(agreed), torch.from_numpy(kept)
    first = first_children(tree)
    rows = drawn.shape[1]
    # The first child's token of each row; others fall into a column that is cut off.
    choice = drawn.new_full((len(drawn), rows + 1), -1)
    choice = choice.scatter(1, tree.parents.masked_fill(~first, rows), tree.tokens)[:, :rows]
    path = torch.nn.functional.pad(acceptance.path, (1, 0))
    on_path = torch.arange(path.shape[1], device=path.device) <= acceptance.num_accepted.unsqueeze(1)
    cheap = choice.gather(1, path).masked_fill(~on_path, -1)
    stood = (torch.nn.functional.pad(first, (1, 0)).gather(1, path) & on_path)[
        :, 1:
    ]  # the row before, by its first child
    same = cheap == drawn.gather(1, path)
    return (cheap >= 0).sum(1), ((cheap >= 0) & same).sum(1), (stood & ~same[:, :-1]).sum(1)
