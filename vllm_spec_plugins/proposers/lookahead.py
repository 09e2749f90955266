# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding and prompt lookup as token trees.

Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding", arXiv 2402.02057; prompt lookup
after Saxena, "Prompt Lookup Decoding", 2023. The best tree under a budget is grown by chance of acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_spec_plugins.proposers.base import StepContext, least_chance
from vllm_spec_plugins.proposers.history import history_guesses
from vllm_spec_plugins.proposers.pool import NgramPool
from vllm_spec_plugins.proposers.window import LookaheadWindow
from vllm_spec_plugins.tree.builders import trie
from vllm_spec_plugins.tree.tree import TokenTree

# Chance that a pool's n-gram is right at its first, second, later token, measured on pools that a window feeds; and the
# factor on the odds of each older n-gram of the bucket.
POOLED = (0.25, 0.5, 0.75)
OLDER = 0.6
# Tokens per step that a window is taken to bring by feeding the pool, until its steps have shown what they bring.
WINDOW_GAIN = 0.5


def _pool_odds(guesses: int, length: int, device: torch.device) -> Tensor:
    """[G, L]"""
    chance = torch.tensor([POOLED[min(step, len(POOLED) - 1)] for step in range(length)], device=device)
    return chance / (1 - chance) * OLDER ** torch.arange(guesses, device=device).unsqueeze(1)


class LookaheadProposer:
    """Guesses from the text and from a pool of n-grams, merged into a trie; the window that feeds the pool behind it.

    The text is the request's own, prompt and answer so far. Pools are per request unless `shared_pool` is set: then
    the texts of all requests show in each other's drafts, and so in their timing.

    Args:
        max_requests: R, rows of the per-request state.
        device: where the state lives.
        window: columns of the lookahead window; 0 = none.
        ngram: length of the pool's n-grams: a key and ngram - 1 tokens that followed it.
        guesses: most guesses per step and source (text, pool).
        nodes: most nodes that all guesses take together after merging; None = guesses * (ngram - 1).
        draft_length: longest guess from the text, in tokens; None or less than ngram - 1 = ngram - 1.
        min_chance: a node is proposed only if its chance of being accepted is estimated to be at least this: two to
            three times the cost of a node as a share of a step without any.
        prompt_pool: guess from the text.
        shared_pool: one pool for all requests, fed with what they emit (and with their windows).
        pool_buckets: buckets of a pool, a power of two; NgramPool tells the memory.
        eos_token_ids: replaced in the window, never in the output.

    Raises:
        ValueError: settings that leave nothing to draft from.
    """

    name = "lookahead"
    reads_hidden = False

    def __init__(
        self,
        *,
        max_requests: int,
        device: torch.device | str = "cpu",
        window: int = 0,
        ngram: int = 5,
        guesses: int = 1,
        nodes: int | None = None,
        draft_length: int | None = 16,
        min_chance: float = 0.12,
        prompt_pool: bool = True,
        shared_pool: bool = False,
        pool_buckets: int = 512,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        if not (window or prompt_pool or shared_pool):
            raise ValueError("window=0, prompt_pool=false and shared_pool=false leave nothing to draft from")
        device = torch.device(device)
        self.guesses, self.min_chance, self.prompt_pool = guesses, min_chance, prompt_pool
        self.length = max(draft_length or 0, ngram - 1)
        self.trie_nodes = guesses * (ngram - 1) if nodes is None else nodes
        self.num_nodes, self.max_depth = self.trie_nodes, min(self.length, self.trie_nodes)
        self.reads_draws = bool(window)
        self.remembers = bool(window or shared_pool)
        self.window: LookaheadWindow | None = None
        self.pool: NgramPool | None = None
        self.shared_pool = shared_pool
        if window:
            self.window = LookaheadWindow(max_requests, window, ngram, eos_token_ids, device)
            self.num_nodes += self.window.num_nodes
            self.max_depth = max(self.max_depth, self.window.max_depth)
        if window or shared_pool:
            self._pool_odds = _pool_odds(guesses, self.length, device)
            self.pool = NgramPool(1 if shared_pool else max_requests, pool_buckets, guesses, ngram, device)

    def add_request(self, slot: int, prompt_len: int) -> None:
        """A new request in row `slot`: its window and its pool start empty."""
        if self.window:
            self.window.clear(slot)
        if self.pool and not self.shared_pool:
            self.pool.clear(slot)

    def propose(self, ctx: StepContext) -> TokenTree:
        """The trie of guesses, then the window if the budget has room for all of it."""
        budget = self.num_nodes if ctx.budget is None else min(ctx.budget, self.num_nodes)
        if self.window:
            ngrams, real = self.window.advance(ctx)
            self._store(ctx, ngrams, real)
        if self.shared_pool:
            self._store(ctx, *self._emitted_ngrams(ctx))
        tree = self._guess(ctx, min(budget, self.trie_nodes))
        if self.window is None:
            return tree
        fits = budget >= self.num_nodes
        tree = self.window.append_to(tree, ctx.slots, fits)
        # None of its rows is ever accepted: what it brings are the pool's n-grams.
        return replace(tree, gain=tree.gain + WINDOW_GAIN) if fits and tree.gain is not None else tree

    def _guess(self, ctx: StepContext, limit: int) -> TokenTree:
        sources = []
        if self.prompt_pool:
            sources.append(
                history_guesses(ctx.token_ids, ctx.slots, ctx.lengths, ctx.max_length, self.guesses, self.length)
            )
        if self.pool:
            sources.append(self._from_pool(ctx))
        ngrams, odds = sources[0] if len(sources) == 1 else (torch.cat(part, 1) for part in zip(*sources, strict=True))
        return trie(ngrams, self.trie_nodes, limit, odds, least_chance(self.min_chance, len(ctx.slots)))

    def _from_pool(self, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Pool n-grams that begin with the root, padded to [B, G, L], and their odds."""
        assert self.pool is not None
        root = ctx.token_ids[ctx.slots, ctx.lengths - 1].long()
        rows = torch.zeros_like(ctx.slots) if self.shared_pool else ctx.slots
        ngrams = self.pool.lookup(rows, root)
        ngrams = torch.nn.functional.pad(ngrams, (0, self.length - ngrams.shape[2]), value=-1)
        return ngrams, self._pool_odds.expand_as(ngrams)

    def _emitted_ngrams(self, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """N-grams that end in the tokens emitted last: [B, D + 1, ngram], newest first, and which of them are real."""
        assert self.pool is not None
        end = torch.arange(self.max_depth + 1, device=self.pool.entries.device)  # 0 = the newest token
        back = end.unsqueeze(1) + torch.arange(self.pool.ngram - 1, -1, -1, device=end.device)
        index = ctx.lengths.view(-1, 1, 1) - 1 - back
        ngrams = ctx.token_ids[ctx.slots.view(-1, 1, 1), index.clamp(min=0)].long()
        return ngrams, (end < ctx.num_emitted.view(-1, 1)) & (index[:, :, 0] >= 0)

    def _store(self, ctx: StepContext, ngrams: Tensor, real: Tensor) -> None:
        assert self.pool is not None
        if not self.shared_pool:
            self.pool.insert(ctx.slots, ngrams, real)
            return
        # One pool: the batch's n-grams in request order, a bounded number at a time.
        row = torch.zeros(1, dtype=torch.int64, device=ngrams.device)
        for part, valid in zip(ngrams.flatten(0, 1).split(256), real.flatten().split(256), strict=True):
            self.pool.insert(row, part.unsqueeze(0), valid.unsqueeze(0))
