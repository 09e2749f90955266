# SPDX-License-Identifier: Apache-2.0
"""A proposer that knows the true continuations and hides them, for tests of the engine's path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_spec_plugins.config import Settings, setting
from vllm_spec_plugins.method import Method, Surroundings
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.registry import METHODS, register
from vllm_spec_plugins.tree.accept import Walk
from vllm_spec_plugins.tree.tree import TokenTree


@dataclass(frozen=True)
class OracleSettings(Settings):
    """``--plugin oracle``: registered by the tests only."""

    name: ClassVar[str] = "oracle"
    nodes: int = setting(7, "nodes per tree", least=1, most=32)


class Oracle:
    """Random ancestors-first trees with the true continuation along one random branch, wrong tokens elsewhere.

    Attributes:
        texts: complete texts (prompt and continuation) as token ids; a request is recognised by its beginning.
        right: whether the branch holds the true continuation; False: every node is wrong.
        branching: whether trees branch at all; False: chains.
        new_requests: requests that moved in, those resumed after preemption counted again.
        accepted: nodes that verification accepted.
    """

    name = "oracle"
    instances: ClassVar[list[Oracle]] = []

    def __init__(self, nodes: int, vocab_size: int, seed: int = 0) -> None:
        self.num_nodes = self.max_depth = nodes
        self.reads_draws = self.reads_hidden = self.remembers = False
        self.vocab_size = vocab_size
        self.texts: list[list[int]] = []
        self.right = self.branching = True
        self.generator = torch.Generator().manual_seed(seed)
        self.new_requests = self.accepted = 0
        if vocab_size > 1:  # not the one that is only asked for its shape
            Oracle.instances.append(self)

    def prepare(self, texts: list[list[int]], right: bool = True, branching: bool = True) -> None:
        """Set up for a run and forget the counts of the last."""
        self.texts, self.right, self.branching = texts, right, branching
        self.new_requests = self.accepted = 0

    def add_request(self, slot: int, prompt_len: int) -> None:
        self.new_requests += 1

    def propose(self, ctx: StepContext) -> TokenTree:
        self.accepted += int((ctx.num_emitted - 1).clamp(min=0).sum())
        tokens = torch.full((len(ctx.slots), self.num_nodes), -1, dtype=torch.int64)
        parents = torch.zeros_like(tokens)
        for b, (slot, length) in enumerate(zip(ctx.slots.tolist(), ctx.lengths.tolist(), strict=True)):
            known = ctx.token_ids[slot, :length].tolist()
            rest = next((text[length:] for text in self.texts if text[:length] == known), [])
            self._tree(tokens[b], parents[b], rest)
        return TokenTree(tokens, parents)

    def _tree(self, tokens: torch.Tensor, parents: torch.Tensor, rest: list[int]) -> None:
        """Fill one tree: each node continues the hidden branch or hangs a wrong token below a random row."""
        tip, depth = 0, 0
        for node in range(self.num_nodes):
            true = rest[depth] if depth < len(rest) else -1
            on_branch = self.right and true >= 0 and (not self.branching or self._random(2) == 0)
            if on_branch:
                tokens[node], parents[node] = true, tip
                tip, depth = node + 1, depth + 1
            else:
                # Never the true token: below the branch's tip it would be right by accident.
                offset = 1 + self._random(self.vocab_size - 1)
                tokens[node] = (max(true, 0) + offset) % self.vocab_size
                parents[node] = self._random(node + 1) if self.branching else node
                if not self.branching:
                    depth = len(rest)  # a chain that has left the true path stays wrong

    def _random(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


def _make(settings: OracleSettings, around: Surroundings) -> Oracle:
    return Oracle(settings.nodes, around.vocab_size)


if "oracle" not in METHODS:
    register(Method(OracleSettings, proposer=_make, rule=lambda _: Walk()))
