# SPDX-License-Identifier: Apache-2.0
"""Scores of skip sets in the engine: how often part of the target guesses what all of it has written.

One forward pass of the part over a text that was verified before: its guess at every token, compared with the next one. The
rows write K/V of their own to the slots of that text, as a draft's rows do, and read each other's; behind the pass the blocks
get back what the whole model had written. The pass stands between two steps, so nobody else reads them meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spec_plugins.engine.layers import Layers
from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.search import Costs
from vllm_spec_plugins.layers.searched import SearchedPlan

if TYPE_CHECKING:
    from vllm_spec_plugins.engine.shallow import ShallowDraft

logger = init_logger("vllm.spec_plugins.skip_search")

# Fewer tokens than this say little about a plan.
LEAST = 16


@dataclass(frozen=True)
class Text:
    """Generated tokens of the request in `slot`: those behind positions first to first + count - 1. `tenant` counts the
    requests that moved in anywhere, so that two texts are the same if they are equal.
    """

    tenant: int
    slot: int
    first: int
    count: int


class SkipScorer:
    """Scores what a planner asks for on requests that `draft` drafts for.

    Its passes depend on the batches alone, which are the same on every tensor-parallel rank.
    """

    def __init__(self, draft: ShallowDraft, planner: SearchedPlan) -> None:
        self.draft, self.planner = draft, planner
        room = draft.target_config.scheduler_config.max_num_batched_tokens
        self.window = min(planner.window, room)
        self.tenants = np.zeros(draft.req_states.max_num_reqs, dtype=np.int64)
        self.moved_in = 0
        self.text: Text | None = None

    def add_request(self, slot: int) -> None:
        """Another request moves into `slot`, or the same one after preemption: its K/V is new."""
        self.moved_in += 1
        self.tenants[slot] = self.moved_in

    def maybe_score(self, slots: np.ndarray, roots: np.ndarray) -> None:
        """Score one plan if it is time.

        Args:
            slots: [B] int64, requests of this step's batch.
            roots: [B] int64, their last known tokens' positions; the whole model's K/V is there for all before.
        """
        if not self.planner.due():
            return
        plan = None
        if self.text is not None and self._is_here(self.text, slots):
            plan = self.planner.ask(self.text)
        if plan is None:
            self.text = self._latest(slots, roots)
            if self.text is None:
                return
            plan = self.planner.ask(self.text)
        if plan is None:  # this text was used up, and nothing has been written since
            return
        assert self.text is not None
        self.planner.tell(plan, self.score(plan, self.text), self.text.count)
        if self.planner.search.settled:
            search = self.planner.search
            logger.info(
                "self-draft: the search is over after %d scores; the draft skips %s and agrees with %.0f%% of the text",
                len(search.scores), search.best.skipped, 100 * (search.agreement or 0.0),
            )  # fmt: skip

    def _is_here(self, text: Text, slots: np.ndarray) -> bool:
        return text.slot in slots and self.tenants[text.slot] == text.tenant

    def _latest(self, slots: np.ndarray, roots: np.ndarray) -> Text | None:
        """The last tokens of the longest answer of the batch; None while all are short."""
        written = roots + 1 - self.draft.req_states.prompt_len.np[slots]
        longest = int(written.argmax())
        count = min(int(written[longest]), self.window)
        if count < min(LEAST, self.window):
            return None
        slot = int(slots[longest])
        return Text(int(self.tenants[slot]), slot, int(roots[longest]) - count, count)

    def score(self, plan: LayerPlan, text: Text) -> int:
        """How many tokens of `text` the plan guesses."""
        draft, last = self.draft, text.first + text.count
        known = draft.req_states.all_token_ids.gpu[text.slot, text.first : last + 1].long()
        position = torch.arange(text.first, last, device=known.device)
        table = draft.table[text.slot : text.slot + 1]
        slot = draft._slots(table, torch.zeros_like(position), position)
        blocks = table[0, text.first // draft.block_size : (last - 1) // draft.block_size + 1].long()
        draft.plan = plan  # until the next trees begin
        with self._kept(plan, blocks):
            hidden = draft._run(known[:-1], position, self._metadata(table, slot, last), slot)
        guesses = draft.model.compute_logits(hidden).argmax(-1)
        return int((guesses == known[1:]).sum())

    def _metadata(self, table: Tensor, slot: Tensor, length: int) -> dict[str, Any]:
        """Causal attention of the last rows of a request of `length` tokens."""
        count = len(slot)
        bounds = torch.tensor([0, count], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=bounds.to(slot.device),
            query_start_loc_cpu=bounds,
            seq_lens=torch.tensor([length], dtype=torch.int32, device=slot.device),
            num_reqs=1,
            num_actual_tokens=count,
            max_query_len=count,
            max_seq_len=length,
            block_table_tensor=table,
            slot_mapping=slot,
        )
        metadata: dict[str, Any] = {}
        for group in self.draft.attn_groups:
            metadata |= dict.fromkeys(group.layer_names, group.get_metadata_builder(0).build(0, common))
        return metadata

    @contextmanager
    def _kept(self, plan: LayerPlan, blocks: Tensor) -> Iterator[None]:
        """The K/V in `blocks` [M] of the layers that `plan` runs is afterwards what it was."""
        caches = [cache for cache, runs in zip(self.draft.caches, plan.attention, strict=True) if runs]
        kept = [cache[blocks] for cache in caches]
        try:
            yield
        finally:
            for cache, each in zip(caches, kept, strict=True):
                cache[blocks] = each


def costs(parts: Layers) -> Costs:
    """The blocks' weights and the LM head's: what a pass over few rows reads, and what one over many multiplies with.

    Experts are read as their rows need them: where there are any, all blocks count alike and the LM head nothing.
    """
    attention, mlp = parts.blocks(0)
    if any(hasattr(m, "quant_method") and not isinstance(m, LinearBase) for part in mlp for m in part.modules()):
        return Costs()
    config = parts.config.model_config
    return Costs(_size(attention), sum(map(_size, mlp)), float(config.get_hidden_size() * config.get_vocab_size()))


def _size(module: torch.nn.Module) -> float:
    return float(sum(m.input_size * m.output_size for m in module.modules() if isinstance(m, LinearBase)))
