# SPDX-License-Identifier: Apache-2.0
"""How often the candidate of each rank at each depth turns out right, measured while serving."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.compiled import kernels_for, loops_for


class Emission(Protocol):
    """What a step emitted (StepContext has it)."""

    slots: Tensor
    token_ids: Tensor
    lengths: Tensor
    num_emitted: Tensor


class Ranks:
    """Chance that the candidate of a rank is the next token, given that the path to it was right.

    Every emitted token judges all candidates of its depth, those that stood in no tree included: the first emitted token
    those of depth 1, the second (the first was right then) those of depth 2. Counts decay, and those of a request lean on
    those of all requests. Decisions are the same on every tensor-parallel rank: they rest on emitted tokens alone.

    Args:
        max_requests: R.
        depth: D.
        per_depth: K, candidates of one depth.
    """

    MEMORY = 0.98  # per judged depth
    PRIOR = 8.0  # judged depths' worth of belief in all requests' figures

    def __init__(self, max_requests: int, depth: int, per_depth: int, device: torch.device) -> None:
        self.depth, self.per_depth = depth, per_depth
        self.offered = torch.full((max_requests, depth, per_depth), -1, dtype=torch.int64, device=device)
        self.offered_at = torch.zeros(max_requests, dtype=torch.int64, device=device)  # known tokens then
        # Row R: all requests together, and before anything is seen: .4 for the first of a head, .4 of what is left ...
        self.hits = torch.zeros(max_requests + 1, depth, per_depth, device=device)
        self.seen = torch.zeros(max_requests + 1, depth, 1, device=device)
        self.first = 0.4 * 0.4 ** torch.arange(per_depth, device=device, dtype=torch.float32)
        self._place = torch.arange(depth, device=device)

    def clear(self, slot: int) -> None:
        """A new request moves in."""
        self.offered[slot] = -1
        self.hits[slot] = 0.0
        self.seen[slot] = 0.0

    def offer(self, slots: Tensor, lengths: Tensor, candidates: Tensor) -> None:
        """Remember `candidates` [B, D, K] for behind `lengths` [B] known tokens; the tokens emitted next judge them."""
        if loops_for(slots):
            rows = slots.numpy()
            self.offered.numpy()[rows], self.offered_at.numpy()[rows] = candidates.numpy(), lengths.numpy()
            return
        self.offered[slots], self.offered_at[slots] = candidates, lengths

    def observe(self, step: Emission) -> None:
        """Judge what was offered by what was emitted, and forget it: also what steps that were not observed went past."""
        if loops_for(step.slots):
            from vllm_spec_plugins.tree import ranks_loops

            ranks_loops.judge(
                self.offered.numpy(),
                self.offered_at.numpy(),
                self.hits.numpy(),
                self.seen.numpy(),
                step.slots.numpy(),
                step.token_ids.numpy(),
                step.lengths.numpy(),
                step.num_emitted.numpy(),
                np.float32(1.0) - np.float32(1.0 - self.MEMORY),
            )
            return
        if kernels_for(self.offered):
            from vllm_spec_plugins.kernels import ranks

            state = self.offered, self.offered_at, self.hits, self.seen
            keep = np.float32(1.0) - np.float32(1.0 - self.MEMORY)
            ranks.judge(*state, step.slots, step.token_ids, step.lengths, step.num_emitted.long(), float(keep))
            return
        offered = self.offered[step.slots]
        emitted = step.num_emitted.long().unsqueeze(1)
        in_time = self.offered_at[step.slots].unsqueeze(1) == step.lengths.unsqueeze(1) - emitted
        judged = (self._place < emitted) & (offered[:, :, 0] >= 0) & in_time  # [B, D]
        index = (step.lengths.unsqueeze(1) - emitted + self._place).clamp(min=0, max=step.token_ids.shape[1] - 1)
        token = step.token_ids[step.slots.unsqueeze(1), index]
        hit = ((offered == token.unsqueeze(2)) & judged.unsqueeze(2)).float()
        seen = judged.unsqueeze(2).float()
        decay = 1.0 - (1.0 - self.MEMORY) * seen
        self.hits[step.slots] = self.hits[step.slots] * decay + hit
        self.seen[step.slots] = self.seen[step.slots] * decay + seen
        together = 1.0 - (1.0 - self.MEMORY) * (seen.sum(0) > 0).float()
        self.hits[-1] = self.hits[-1] * together + hit.sum(0)
        self.seen[-1] = self.seen[-1] * together + seen.sum(0)
        self.offered[step.slots] = -1

    def chance(self, slots: Tensor) -> Tensor:
        """[B, D, K] float: the chance of each candidate."""
        if loops_for(slots):
            from vllm_spec_plugins.tree import ranks_loops

            hits, seen, first = self.hits.numpy(), self.seen.numpy(), self.first.numpy()
            return torch.from_numpy(ranks_loops.rank_chances(hits, seen, slots.numpy(), first, np.float32(self.PRIOR)))
        if kernels_for(slots):
            from vllm_spec_plugins.kernels import ranks

            return ranks.rank_chances(self.hits, self.seen, slots, self.first, self.PRIOR)
        everyone = (self.hits[-1] + self.PRIOR * self.first) / (self.seen[-1] + self.PRIOR)
        return (self.hits[slots] + self.PRIOR * everyone) / (self.seen[slots] + self.PRIOR)
