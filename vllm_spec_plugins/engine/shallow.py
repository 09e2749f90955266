# SPDX-License-Identifier: Apache-2.0
"""The target as its own draft: some of its blocks guess, all of them verify.

The guesses' K/V goes to the target's own slots, behind what it has verified, and verification writes the same slots anew: it
starts at the same root, and computes every row that it keeps. So nothing has to be kept, moved or read again, whatever the
plan was, and each step may draft with another one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.states import RequestState

from vllm_spec_plugins.engine.drafter import PagedDraft, Step
from vllm_spec_plugins.engine.layers import Layers, skip_compiled
from vllm_spec_plugins.engine.skip_search import SkipScorer, costs
from vllm_spec_plugins.layers.exit_policy import ExitPolicy, ExitSignals
from vllm_spec_plugins.layers.plan import exits_of
from vllm_spec_plugins.layers.planner import Planner
from vllm_spec_plugins.layers.searched import SearchedPlan
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.tree.tree import TokenTree


class ShallowDraft(PagedDraft):
    """Drafts with the part of the target that `planner` names, no further than `policy` finds its answers good.

    Args:
        judges: the policy stops nothing, it scores.
    """

    what = "the target"

    def __init__(
        self,
        vllm_config: VllmConfig,
        req_states: RequestState,
        planner: Planner,
        policy: ExitPolicy | None = None,
        judges: bool = False,
    ) -> None:
        super().__init__(vllm_config, req_states)
        self.planner, self.policy, self.judges = planner, policy, judges
        self.scorer = SkipScorer(self, planner) if isinstance(planner, SearchedPlan) else None
        self.streams: list[Tensor] = []  # behind the exits of the last pass

    def load(self, target: nn.Module) -> None:
        """Raises UnsupportedModel when the target cannot be run in part."""
        self.model, self.parts = target, Layers(target, self.target_config)
        self.layers, self.costs = self.parts.names, costs(self.parts)
        if self.scorer is not None:
            self.scorer.planner.measured(self.costs)

    def warm(self, count: int) -> None:
        """Nothing of a part is compiled."""

    def begin(self, ctx: StepContext) -> Tensor:
        slots = ctx.slots.numpy()
        # Where the next row goes. Inside a prompt that is its next token; what is drafted there comes to nothing.
        roots = self.req_states.num_computed_tokens.gpu.numpy()[slots].astype("int64")
        if self.scorer is not None:
            self.scorer.maybe_score(slots, roots)
            self.scorer.planner.stepped(len(slots))
        self.plan = self.planner.plan(roots - self.req_states.prompt_len.np[slots])
        self.cost = self.costs.of(self.plan)
        self.slots, self.step = slots, Step(torch.from_numpy(roots), self.table[ctx.slots])
        token = torch.from_numpy(self.req_states.all_token_ids.gpu.numpy()[slots, roots])
        request = torch.arange(len(slots))
        return self._grow(TokenTree.empty(len(slots), 0, token.device), request, torch.zeros_like(request), token)

    def add_request(self, slot: int, computed: int) -> None:
        if self.scorer is not None:
            self.scorer.add_request(slot)

    def _grow(self, tree: TokenTree, request: Tensor, row: Tensor, token: Tensor) -> Tensor:
        if self.scorer is not None:
            self.scorer.planner.drafted(len(row))
        logits = super()._grow(tree, request, row, token)
        if self.policy is not None:
            signals = ExitSignals(self.plan.exit_layer, token, logits, *self._exits(token))
            if self.judges:
                self.score = self.policy.score(signals)
            else:
                self.kept = self.policy.good(signals)
        return logits

    def _forward(self, token: Tensor, position: Tensor) -> Tensor:
        skip_compiled()
        self.streams.clear()
        tap = None
        if self.policy is not None:
            exits = exits_of(self.plan, max(2, self.policy.exits_needed))
            tap = lambda number, stream: self.streams.append(stream) if number in exits else None  # noqa: E731
        with self.parts.running(self.plan, tap):
            return super()._forward(token, position)

    def _exits(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`hidden`, `earlier` and `earlier_hidden` of ExitSignals for the pass that has just run."""
        assert self.policy is not None
        *before, hidden = self.streams
        guesses = [token.new_empty(len(token), 0)]
        for stream in before if self.policy.exits_needed > 1 else ():
            with (
                set_forward_context(None, self.target_config, num_tokens=len(token), skip_compiled=True),
                self.parts.ending(stream),
            ):
                ended = super()._forward(token, torch.zeros_like(token))
            guesses.append(self.model.compute_logits(ended).argmax(1, keepdim=True))
        return hidden, torch.cat(guesses, 1), before[-1] if before else None
