# SPDX-License-Identifier: Apache-2.0
"""Several proposers, one tree: the union of theirs, each believed as far as it has kept its promises."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_spec_plugins.proposers.base import Proposer, StepContext, least_chance
from vllm_spec_plugins.tree.calibration import Calibration
from vllm_spec_plugins.tree.tree import TokenTree
from vllm_spec_plugins.tree.union import Forest, union


class MixtureProposer:
    """Asks every source and ranks their nodes together. A source that knows nothing of a request gives an empty tree there.

    Sources get the step's context as it is; `ctx.tree` is the union, in which a source's rows are not where it put them.

    Args:
        sources: at least one, unless only the shape is asked for.
        max_requests: R, rows of the per-request state.
        device: where the state lives.
        nodes: N, nodes of the union; 0 = as many as the largest source has.
        min_chance: as for LookaheadProposer, of a node of the union; each source applies its own to its own tree.
    """

    name = "mix"

    def __init__(
        self,
        sources: Sequence[Proposer],
        *,
        max_requests: int,
        device: torch.device | str = "cpu",
        nodes: int = 0,
        min_chance: float = 0.12,
    ) -> None:
        self.sources, self.min_chance = tuple(sources), min_chance
        sizes = [source.num_nodes for source in sources]
        deepest = max((source.max_depth for source in sources), default=0)
        self.num_nodes = nodes or max(sizes, default=0)
        self.max_depth = min(deepest, self.num_nodes)
        self.reads_draws = any(source.reads_draws for source in sources)
        self.reads_hidden = any(source.reads_hidden for source in sources)
        self.remembers = any(source.remembers for source in sources)
        self.calibration = Calibration(max_requests, sizes, deepest, torch.device(device))

    def add_request(self, slot: int, prompt_len: int) -> None:
        """A new request in row `slot`, for every source."""
        self.calibration.clear(slot)
        for source in self.sources:
            source.add_request(slot, prompt_len)

    def propose(self, ctx: StepContext) -> TokenTree:
        """Judge what the sources promised last, ask them again, and merge."""
        self.calibration.observe(ctx)
        forest = Forest.of([source.propose(ctx) for source in self.sources])
        self.calibration.offer(ctx.slots, ctx.lengths, forest)
        least = least_chance(self.min_chance, len(ctx.slots))
        return union(forest, self.calibration.factors(ctx.slots), self.num_nodes, ctx.budget, least)
