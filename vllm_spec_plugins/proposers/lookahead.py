# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding (Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding",
arXiv 2402.02057, and prompt lookup decoding) as token trees."""

from __future__ import annotations

import torch

from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.proposers.history import history_guesses
from vllm_spec_plugins.tree.builders import trie
from vllm_spec_plugins.tree.tree import TokenTree


class LookaheadProposer:
    """Guesses from the request's own text, merged into a trie under the last token.

    Args:
        max_requests: R, rows of the per-request state.
        device: where the state lives.
        window: columns of the lookahead window; 0 = prompt lookup only.
        ngram: length of the n-grams; a guess is what follows the first token: ngram - 1 tokens.
        guesses: most guesses verified per step.
        nodes: most nodes that the guesses may take after merging; None = guesses * (ngram - 1).
        match: longest suffix of the text that a guess from the text is looked up with.
    """

    name = "lookahead"

    def __init__(
        self,
        *,
        max_requests: int,
        device: torch.device | str = "cpu",
        window: int = 0,
        ngram: int = 5,
        guesses: int = 7,
        nodes: int | None = None,
        prompt_pool: bool = True,
        shared_pool: bool = False,
        match: int = 3,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        if window:
            raise NotImplementedError("window > 0 follows")
        self.max_requests, self.device = max_requests, torch.device(device)
        self.guesses, self.length, self.match = guesses, ngram - 1, match
        self.num_nodes = guesses * self.length if nodes is None else nodes
        self.max_depth = min(self.length, self.num_nodes)

    def add_request(self, slot: int, prompt_len: int) -> None:
        """Nothing to forget: the text itself is the pool."""

    def propose(self, ctx: StepContext) -> TokenTree:
        found = history_guesses(
            ctx.token_ids, ctx.slots, ctx.lengths, ctx.max_length, self.match, self.guesses, self.length
        )
        return trie(found, self.num_nodes, ctx.budget)
