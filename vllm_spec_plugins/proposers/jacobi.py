# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding as chains: what the target drew behind a wrong guess is the next guess.

Santilli et al., "Accelerating Transformer Inference for Translation via Parallel Decoding", arXiv 2305.10427, section 3:
parallel (PJ), block by block (PGJ) and hybrid (HGJ) iteration. There the iteration stops at a greedy fixed point; here each
row is drawn with the noise of its position, so the fixed point is plain decoding's text at every temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_spec_plugins.proposers.base import Count, StepContext
from vllm_spec_plugins.settings import JACOBI_MODES
from vllm_spec_plugins.tree.builders import chain
from vllm_spec_plugins.tree.tree import TokenTree


class JacobiProposer:
    """Iterates on `block` tokens behind the root. Each step fixes one token at least: the root's own draw.

    Args:
        max_requests: R, rows of the per-request state.
        device: where the state lives.
        block: tokens that are iterated on together.
        mode: "parallel": the block slides, tokens that get fixed make room for new ones at its end. "blocks": a block is
            finished before the next one begins. "hybrid": blocks for a request's first tokens, then plain decoding.
        parallel_tokens: hybrid only, how many tokens of the answer are decoded in blocks.
    """

    name = "jacobi"
    reads_draws = remembers = True
    reads_hidden = False
    counts = (
        Count("jacobi_iterations", "Passes over blocks of Jacobi decoding.", per="jacobi_blocks"),
        Count("jacobi_blocks", "Blocks of Jacobi decoding that were finished; of a sliding block, its lengths."),
    )

    def __init__(
        self, *, max_requests: int, device: torch.device | str, block: int, mode: str, parallel_tokens: int
    ) -> None:
        if mode not in JACOBI_MODES:
            raise ValueError(f"mode must be one of {', '.join(JACOBI_MODES)}, got {mode!r}")
        self.num_nodes = self.max_depth = self.block = block
        self.mode, self.parallel_tokens = mode, parallel_tokens
        self.open = torch.full((max_requests,), block, dtype=torch.int64, device=device)  # tokens left of the block
        self.prompt = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self.counted = torch.zeros(len(self.counts), dtype=torch.int64, device=device)
        self._place = torch.arange(block, device=device)

    def add_request(self, slot: int, prompt_len: int) -> None:
        """A new request in row `slot` begins a block."""
        self.open[slot] = self.block
        self.prompt[slot] = prompt_len

    def take_counts(self) -> Tensor:
        """Iterations and blocks since last asked."""
        taken, self.counted = self.counted, torch.zeros_like(self.counted)
        return taken

    def propose(self, ctx: StepContext) -> TokenTree:
        """The draws behind the new root as a chain; where nothing was drawn yet, the text's last tokens again."""
        assert ctx.drawn is not None
        emitted = ctx.num_emitted.long()
        # Row j drew the token behind node j. The new root was drawn at row emitted - 1, the guess behind it one further on.
        row = (emitted.unsqueeze(1) + self._place).clamp(max=ctx.drawn.shape[1])
        guess = pad(ctx.drawn, (0, 1), value=-1).gather(1, row)
        # What lies behind a row that was not computed was not computed either.
        known = (guess >= 0).cumprod(1).bool() & (emitted > 0).unsqueeze(1)
        index = (ctx.lengths.unsqueeze(1) - self.block + self._place).clamp(min=0)
        tokens = guess.where(known, ctx.token_ids[ctx.slots.unsqueeze(1), index].long())
        return chain(tokens.masked_fill(self._place >= self._length(ctx, emitted).unsqueeze(1), -1))

    def _length(self, ctx: StepContext, emitted: Tensor) -> Tensor:
        """[B]: nodes of each chain."""
        left = self.open[ctx.slots] - emitted
        finished = left <= 0
        if self.mode == "parallel":  # tokens beyond the end are the next block's
            finished = finished * (1 + -left // self.block)
            left = left + finished * self.block
            length = torch.full_like(left, self.block)
        else:
            length = left = left.masked_fill(finished, self.block)
        self.open[ctx.slots] = left
        iterated = emitted > 0
        if self.mode == "hybrid":
            answered = ctx.lengths - self.prompt[ctx.slots]
            length = length.where(answered < self.parallel_tokens, 0)
            iterated &= answered - emitted < self.parallel_tokens
        self.counted += torch.stack((iterated.sum(), (finished * iterated).sum()))
        return length if ctx.budget is None else length.clamp(max=ctx.budget)
