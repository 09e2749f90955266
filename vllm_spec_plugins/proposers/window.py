# SPDX-License-Identifier: Apache-2.0
"""The two-dimensional window of lookahead decoding: a Jacobi iteration that runs ahead of the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.tree.builders import append
from vllm_spec_plugins.tree.topology import lookahead_window
from vllm_spec_plugins.tree.tree import TokenTree


class LookaheadWindow:
    """Windows of R requests: `ngram` - 1 rows of `window` columns (Fu et al., arXiv 2402.02057, section 3.2).

    Cell (r, i) guesses the token r + i behind the root; cell (0, 0) is the root itself. Every step draws a new last
    row below the window, reads one n-gram off each column, and moves the rows up. A new request has one row of tokens
    picked from its text; the others fill over its first ngram - 2 steps.

    In the tree, cell (r, i) is row r * window + i of `lookahead_window`, behind the guesses' nodes.
    """

    def __init__(
        self, max_requests: int, window: int, ngram: int, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        self.window, self.ngram, self.rows = window, ngram, ngram - 1
        topology = lookahead_window(window, ngram)
        self.num_nodes, self.max_depth = topology.num_nodes, topology.max_depth
        self.parents = torch.tensor(topology.parents, dtype=torch.int64, device=device)
        self.cells = torch.zeros(max_requests, self.rows, window, dtype=torch.int64, device=device)
        # Last row that is filled; -1 = no window yet.
        self.level = torch.full((max_requests,), -1, dtype=torch.int64, device=device)
        # Nodes before the window in the tree proposed last; -1 = that tree had no window.
        self.start = torch.full((max_requests,), -1, dtype=torch.int64, device=device)
        self._eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self._column = torch.arange(window, device=device)
        self._cell = torch.arange(ngram * window, device=device).view(ngram, window)
        self._salt = (self._cell * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF

    def clear(self, slot: int) -> None:
        """Forget the window of `slot`."""
        self.level[slot] = -1
        self.start[slot] = -1

    def _picked(self, ctx: StepContext) -> Tensor:
        """[B, ngram, window]: tokens of each text, picked by a counter, so every rank and every run picks the same."""
        count = ctx.lengths.view(-1, 1, 1)
        index = ((self._salt ^ (count * 0x85EBCA6B)) * 0xC2B2AE35 >> 13) % count
        return ctx.token_ids[ctx.slots.view(-1, 1, 1), index].long()

    def advance(self, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Take in the last row's draws and move the window to the new root.

        Returns:
            n-grams [B, window, ngram] read off the columns, and which of them are real [B, window].
        """
        assert ctx.drawn is not None
        if kernels_for(self.cells):
            from vllm_spec_plugins.kernels import window

            state, text = (self.cells, self.level, self.start), (ctx.slots, ctx.token_ids, ctx.lengths)
            return window.advance(*state, *text, ctx.num_emitted.long(), ctx.drawn, self._eos)
        slots, width, full = ctx.slots, self.window, self.rows - 1
        cells, level, start = self.cells[slots], self.level[slots], self.start[slots]
        level = level.view(-1, 1)
        picked = self._picked(ctx)

        # The last filled row's place in the tree; its draws are missing where the tree was cut or never verified.
        row = level * width + self._column
        row = (row + (row > 0) * start.view(-1, 1)).clamp_(0, ctx.drawn.shape[1] - 1)
        new = ctx.drawn.gather(1, row)
        ran = ((start >= 0) & (level[:, 0] >= 0) & (ctx.num_emitted > 0) & (new[:, -1] >= 0)).view(-1, 1)
        if len(self._eos):
            ended = (new.unsqueeze(2) == self._eos).any(2)
            new = new.where(~ended, picked[:, -1])
        whole = ran & (level == full)
        ngrams = torch.cat((cells, new.unsqueeze(1)), 1).transpose(1, 2)

        # Lay the new row below the last filled one; a full window then drops row 0.
        tall = torch.cat((cells, cells[:, :1]), 1)
        below = (level + 1).clamp_(max=self.rows).view(-1, 1, 1).expand(-1, 1, width)
        tall.scatter_(1, below, new.unsqueeze(1))
        up = whole.view(-1, 1, 1)
        # The root moved on by the emitted tokens: keep every cell at its own position of the text.
        left = ran.view(-1, 1, 1) * (ctx.num_emitted.view(-1, 1, 1) - up.long())
        column = self._column + left
        known = (column < width) & (level.view(-1, 1, 1) >= 0)
        index = self._cell[: self.rows] // width * width + up * width + column.clamp(max=width - 1)
        cells = tall.flatten(1).gather(1, index.flatten(1)).view_as(cells)
        cells = cells.where(known, picked[:, : self.rows])
        root = ctx.token_ids[slots, (ctx.lengths - 1).clamp(min=0)]
        cells[:, 0, 0] = root
        self.cells[slots] = cells
        self.level[slots] = (level + ran).clamp_(0, full).squeeze(1)
        return ngrams, whole.expand(-1, width)

    def append_to(self, tree: TokenTree, slots: Tensor, fits: bool) -> TokenTree:
        """[B, T + num_nodes]: `tree` [B, T] and behind its nodes the windows of `slots`, or nothing if not `fits`."""
        filled = (self.level[slots] + 1) * self.window - 1 if fits else torch.zeros_like(slots)
        self.start[slots] = tree.num_nodes if fits else -1
        absent = self._cell.flatten()[: self.num_nodes] >= filled.unsqueeze(1)
        tokens = self.cells[slots].flatten(1)[:, 1:].masked_fill(absent, -1)
        return append(tree, tokens, self.parents, self.max_depth)
