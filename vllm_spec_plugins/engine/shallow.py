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
from vllm.v1.worker.gpu.states import RequestState

from vllm_spec_plugins.engine.drafter import PagedDraft, Step
from vllm_spec_plugins.engine.layers import Layers, skip_compiled
from vllm_spec_plugins.engine.skip_search import SkipScorer, costs
from vllm_spec_plugins.layers.planner import Planner
from vllm_spec_plugins.layers.searched import SearchedPlan
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.tree.tree import TokenTree


class ShallowDraft(PagedDraft):
    """Drafts with the part of the target that `planner` names."""

    what = "the target"

    def __init__(self, vllm_config: VllmConfig, req_states: RequestState, planner: Planner) -> None:
        super().__init__(vllm_config, req_states)
        self.planner = planner
        self.scorer = SkipScorer(self, planner) if isinstance(planner, SearchedPlan) else None

    def load(self, target: nn.Module) -> None:
        """Raises UnsupportedModel when the target cannot be run in part."""
        self.model, self.parts = target, Layers(target, self.target_config)
        self.layers = self.parts.names
        if self.scorer is not None:
            self.scorer.planner.measured(costs(self.parts))

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
        self.step = Step(slots, roots, self.table[ctx.slots])
        token = torch.from_numpy(self.req_states.all_token_ids.gpu.numpy()[slots, roots])
        request = torch.arange(len(slots))
        return self._grow(TokenTree.empty(len(slots), 0, token.device), request, torch.zeros_like(request), token)

    def add_request(self, slot: int, computed: int) -> None:
        if self.scorer is not None:
            self.scorer.add_request(slot)

    def extend(self, tree: TokenTree, request: Tensor, row: Tensor) -> Tensor:
        if self.scorer is not None:
            self.scorer.planner.drafted(len(row))
        return super().extend(tree, request, row)

    def _forward(self, token: Tensor, position: Tensor) -> Tensor:
        skip_compiled()
        with self.parts.running(self.plan):
            return super()._forward(token, position)
