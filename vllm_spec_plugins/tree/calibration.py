# SPDX-License-Identifier: Apache-2.0
"""What the promises of several sources are worth, measured while serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.tree.ranks import Emission
from vllm_spec_plugins.tree.tree import TokenTree
from vllm_spec_plugins.tree.union import Forest, source_of


class Calibration:
    """A factor per request and source, on the odds that the source gives its nodes.

    An emitted token judges a source if all tokens emitted before it in the step stand in the source's tree with a child
    behind them: the children promised to be right with odds / (1 + odds), and one of them was, or none. Whether a node was
    verified does not matter, so a source is judged whether or not the union had room for it. The factor is

        odds of the share of such places where a child was right / odds of the mean promise there.

    Counts decay, and those of a request lean on those of all requests. They rest on emitted tokens alone, so they are the
    same on every tensor-parallel rank.

    Args:
        max_requests: R.
        sizes: nodes of each source's trees.
        max_depth: D, of any of them.
    """

    MEMORY = 0.98  # per judged step
    PRIOR = 8.0  # places' worth of belief in all requests' figures; theirs lean as much on what is promised
    EXTREME = 0.01  # no share counts as nearer to 0 or 1 than this

    def __init__(self, max_requests: int, sizes: Sequence[int], max_depth: int, device: torch.device) -> None:
        shape = (max_requests, sum(sizes))
        self.max_depth, self.sources = max_depth, len(sizes)
        self.tokens = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.parents = torch.zeros(shape, dtype=torch.int64, device=device)
        self.odds = torch.zeros(shape, dtype=torch.float64, device=device)
        self.source = source_of(tuple(sizes), device)
        self.offered_at = torch.full((max_requests,), -1, dtype=torch.int64, device=device)  # known tokens then
        # Row R: all requests together. Places, the sum of their promises, places where a child was right.
        self.counts = torch.zeros(max_requests + 1, len(sizes), 3, dtype=torch.float64, device=device)
        self._place = torch.arange(max_depth, device=device)

    def clear(self, slot: int) -> None:
        """A new request moves in."""
        self.offered_at[slot] = -1
        self.counts[slot] = 0.0

    def offer(self, slots: Tensor, lengths: Tensor, forest: Forest) -> None:
        """Remember what is promised behind `lengths` [B] known tokens; the tokens emitted next judge it."""
        self.tokens[slots], self.parents[slots], self.odds[slots] = forest.tokens, forest.parents, forest.odds
        self.offered_at[slots] = lengths

    def observe(self, step: Emission) -> None:
        """Judge what was offered by what was emitted, and forget it: also what steps that were not observed went past."""
        if loops_for(self.tokens):
            from vllm_spec_plugins.tree import union_loops

            given = step.slots.numpy(), step.token_ids.numpy(), step.lengths.numpy(), step.num_emitted.numpy()
            offered = self.tokens.numpy(), self.parents.numpy(), self.odds.numpy(), self.source.numpy()
            figures = self.offered_at.numpy(), self.counts.numpy()
            union_loops.observe(*given, *offered, *figures, self.max_depth, self.MEMORY)
            return
        if kernels_for(self.tokens):
            from vllm_spec_plugins.kernels import calibration

            on_device = step.slots, step.token_ids, step.lengths, step.num_emitted.long()
            forest = self.tokens, self.parents, self.odds, self.source
            calibration.observe(*on_device, *forest, self.offered_at, self.counts, self.max_depth, self.MEMORY)
            return
        slots, emitted = step.slots, step.num_emitted.long()
        known = step.lengths - emitted
        count = (emitted * (self.offered_at[slots] == known)).clamp(max=self.max_depth)
        index = (known.unsqueeze(1) + self._place).clamp(min=0, max=step.token_ids.shape[1] - 1)
        text = step.token_ids[slots.unsqueeze(1), index].long()
        new = self._judge(self.tokens[slots], self.parents[slots], self.odds[slots], text, count)
        judged = new[:, :, :1] > 0
        self.counts[slots] = self.counts[slots] * (1.0 - (1.0 - self.MEMORY) * judged) + new
        self.counts[-1] = self.counts[-1] * (1.0 - (1.0 - self.MEMORY) * judged.any(0)) + new.sum(0)
        self.offered_at[slots] = -1

    def _judge(self, tokens: Tensor, parents: Tensor, odds: Tensor, text: Tensor, count: Tensor) -> Tensor:
        """[B, S, 3], what a step adds to `counts`: the first `count` [B] tokens of `text` [B, D] were emitted."""
        forest = TokenTree(tokens, parents, self.max_depth)
        depth = forest.depth[:, 1:]
        reached = (tokens >= 0) & (depth <= count.unsqueeze(1))
        match = reached & (tokens == text.gather(1, depth - 1))
        right = ~(forest.ancestors()[:, :, 1:] & ~match.unsqueeze(1)).any(2)  # [B, M + 1]; the root always is
        judged = reached & right.gather(1, parents)
        # A place: the children of one source at one depth.
        group = self.source * self.max_depth + depth - 1
        every = torch.arange(self.sources * self.max_depth, device=group.device).view(1, -1, 1)
        members = (group.unsqueeze(1) == every) & judged.unsqueeze(1)  # [B, S * D, M]
        total = (members * odds.unsqueeze(1)).sum(2)
        places = members.any(2).double()
        hits = (members & match.unsqueeze(1)).any(2).double()
        counts = torch.stack((places, total / (1.0 + total), hits), 2)
        return counts.view(len(tokens), self.sources, self.max_depth, 3).sum(2)

    def factors(self, slots: Tensor) -> Tensor:
        """[B, S] float64: what to multiply each source's odds with."""
        if loops_for(self.counts):
            from vllm_spec_plugins.tree import union_loops

            return torch.from_numpy(union_loops.factors(slots.numpy(), self.counts.numpy(), self.PRIOR, self.EXTREME))
        if kernels_for(self.counts):
            from vllm_spec_plugins.kernels import calibration

            return calibration.factors(slots, self.counts, self.PRIOR, self.EXTREME)
        places, promised, right = self.counts[-1].unbind(1)
        promise = (promised / places.clamp(min=1e-9)).where(places > 0, 0.5)
        overall = self._factor(promise, (right + self.PRIOR * promise) / (places + self.PRIOR))
        places, promised, right = self.counts[slots].unbind(2)
        promise = (promised / places.clamp(min=1e-9)).where(places > 0, promise)
        expected = promise * overall / (1.0 - promise + promise * overall)
        return self._factor(promise, (right + self.PRIOR * expected) / (places + self.PRIOR))

    def _factor(self, promise: Tensor, share: Tensor) -> Tensor:
        promise, share = (each.clamp(self.EXTREME, 1.0 - self.EXTREME) for each in (promise, share))
        return share * (1.0 - promise) / (promise * (1.0 - share))
