# SPDX-License-Identifier: Apache-2.0
"""What one step hands to the next: each request's tree, and what verifying it showed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_spec_plugins.cascade.routes import Routes
from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.engine.contrastive import Searches
from vllm_spec_plugins.tree.accept import Acceptance
from vllm_spec_plugins.tree.tree import TokenTree


@dataclass(eq=False)
class StepTrees:
    """The trees under verification in one step. B requests; the first `num_trees` of them are those with drafts.

    Attributes:
        tree: B trees of N nodes, cut to what the scheduler scheduled; requests without drafts have no nodes.
        num_rows: [B] int64 on the host, rows to be verified per request: its scheduled nodes and the root.
        num_trees: requests up to the last one with drafts.
        request: [L] int64, the request of each row; rows are laid out request by request, as logits are.
        branched: some tree is not a chain, so causal attention would be wrong.
    """

    tree: TokenTree
    num_rows: np.ndarray
    num_trees: int
    request: Tensor
    branched: bool


@dataclass(eq=False)
class Verified:
    """Outcome of one step's verification, for the whole batch of B requests.

    Attributes:
        tree: [B, N], the trees as verified (absent nodes where a request had none).
        drawn: [B, N + 1] int64, the target's draw at every row, -1 where there was no row.
        acceptance: the rule's choice.
    """

    tree: TokenTree
    drawn: Tensor
    acceptance: Acceptance


class TreeState:
    """Trees by request slot, shared by speculator, model state and sampler; hung on vLLM's RequestState.

    Attributes:
        tokens, parents: [R, N] int64, the tree each request will have verified next (TokenTree's layout).
        reads_draws: the proposer looks at the draws of rows that were not accepted, so every row is drawn.
        on_new_request: called with slot, prompt length and tokens found in the prefix cache when a request moves in.
        trees: this step's trees; None when no request has drafts.
        likeliest: (logits [n, V], their requests' rows [n], those rows on the host, positions [n], K) -> [n, K] int64,
            the tokens that the sampler would prefer, and their scores; set when the sampler is made.
        confidence_of: (logits [n, V], their requests' rows [n], those rows on the host) -> [n] float32, the largest probability
            that the sampler would draw with; set with it.
        searches: the requests of contrastive search.
        routes: the requests' routes through a cascade, and confidence [R, N] float32, of the trees; None without one.
        lossy: [1] int64, accepted tokens that the target had not drawn, since last taken; None under a lossless rule.
        verified: this step's outcome; None until the sampler has run, and when no request had drafts.
    """

    def __init__(
        self,
        max_requests: int,
        num_nodes: int,
        max_depth: int,
        device: torch.device,
        on_new_request: Callable[[int, int, int], None],
        reads_draws: bool,
        routes: Routes | None = None,
    ) -> None:
        self.num_nodes, self.max_depth, self.reads_draws = num_nodes, max_depth, reads_draws
        self._on_new_request = on_new_request
        self.tokens = torch.full((max_requests, num_nodes), -1, dtype=torch.int64, device=device)
        self.parents = torch.zeros(max_requests, num_nodes, dtype=torch.int64, device=device)
        self.likeliest: Callable[[Tensor, Tensor, np.ndarray, Tensor, int], tuple[Tensor, Tensor]]
        self.confidence_of: Callable[[Tensor, Tensor, np.ndarray], Tensor]
        self.searches = Searches()
        self.routes = routes
        self.confidence = None if routes is None else torch.zeros(max_requests, num_nodes, device=device)
        self.lossy: Tensor | None = None
        self.trees: StepTrees | None = None
        self.verified: Verified | None = None

    def add_request(self, slot: int, prompt_len: int, computed: int) -> None:
        """A new request, or one resumed after preemption, moves into `slot`: it has no tree."""
        self._on_new_request(slot, prompt_len, computed)
        self.tokens[slot].fill_(-1)
        self.parents[slot].zero_()

    def begin_step(self, slots: Tensor, num_drafts: np.ndarray | None) -> None:
        """Look up the trees of the requests that have drafts scheduled.

        Args:
            slots: [B] int64, the batch's request rows.
            num_drafts: [B] nodes scheduled per request, on the host; None = none at all.
        """
        self.end_step()
        if num_drafts is None or not num_drafts.any():
            return
        num_rows = num_drafts.astype(np.int64) + 1
        num_trees = int(np.flatnonzero(num_drafts)[-1]) + 1
        if loops_for(self.tokens):
            tree, branched, request = self._scheduled(slots, num_rows - 1)
            self.trees = StepTrees(tree, num_rows, num_trees, request, branched)
            return
        request = async_tensor_h2d(np.repeat(np.arange(len(num_rows)), num_rows), slots.device)
        scheduled = async_tensor_h2d(num_rows - 1, slots.device)
        tree = TokenTree(self.tokens[slots], self.parents[slots], self.max_depth, confidence=self._confidence(slots))
        tree = tree.truncate(scheduled)
        # Whether a tree branches would have to be asked of the device.
        self.trees = StepTrees(tree, num_rows, num_trees, request, branched=True)

    def _scheduled(self, slots: Tensor, counts: np.ndarray) -> tuple[TokenTree, bool, Tensor]:
        from vllm_spec_plugins.tree import loops

        tokens, parents, branched, request = loops.scheduled(
            self.tokens.numpy(), self.parents.numpy(), slots.numpy(), counts
        )
        tree = TokenTree(
            torch.from_numpy(tokens), torch.from_numpy(parents), self.max_depth, confidence=self._confidence(slots)
        )
        return tree, bool(branched), torch.from_numpy(request)

    def _confidence(self, slots: Tensor) -> Tensor | None:
        return None if self.confidence is None else self.confidence[slots]

    def end_step(self) -> None:
        """Forget the step: dummy runs and steps without drafts must not see an earlier step's trees."""
        self.trees = self.verified = None

    def store(self, slots: Tensor, tree: TokenTree) -> None:
        """Keep `tree` [B, N] as the next trees of `slots`."""
        if self.confidence is not None:
            assert tree.confidence is not None
            self.confidence[slots] = tree.confidence
        if loops_for(self.tokens):
            rows = slots.numpy()
            self.tokens.numpy()[rows], self.parents.numpy()[rows] = tree.tokens.numpy(), tree.parents.numpy()
            return
        self.tokens[slots] = tree.tokens
        self.parents[slots] = tree.parents
