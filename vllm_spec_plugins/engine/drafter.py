# SPDX-License-Identifier: Apache-2.0
"""What drafts in the engine writes K/V to the target's blocks; a draft model has layers of its own beside the target's.

A draft model's keys and values of a token stand in the block and at the offset where the target's stand, in caches of the
draft's own layers. So there is one block table, prefix caching covers the draft as well, and a prompt is read once.
Nodes of the tree that is being grown stand behind the root, in the order in which the draft gets them: slots that the
scheduler keeps for it (`VllmConfig.num_lookahead_tokens`). Those whose tokens come true are moved to where the target's will
stand; the others are overwritten.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, get_layers_from_vllm_config, replace
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.states import RequestState

from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.engine import kv
from vllm_spec_plugins.engine.backend import backend_of
from vllm_spec_plugins.engine.tree_rows import TreeRows
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.tree.tree import TokenTree

# What vLLM's kernels take for "do not write".
NO_SLOT = -1


def model_config(target: ModelConfig, model: str) -> ModelConfig:
    """The configuration of draft model `model` beside `target`."""
    return ModelConfig(
        model=model,
        runner="draft",
        tokenizer=target.tokenizer,
        tokenizer_mode=target.tokenizer_mode,
        trust_remote_code=target.trust_remote_code,
        dtype=target.dtype,
        seed=target.seed,
        spec_target_max_model_len=target.max_model_len,
        enforce_eager=target.enforce_eager,
        max_logprobs=target.max_logprobs,
        config_format=target.config_format,
    )


@dataclass(eq=False)
class Step:
    """The batch that trees are grown for: the positions of its requests' roots [B] int64, and their blocks [B, M]."""

    roots: Tensor
    table: Tensor


class PagedDraft(ABC):
    """What drafts over the target's block table (`proposers.base.DraftModel`): nodes get slots behind the root.

    Made with the speculator, loaded after the target, bound to K/V caches when those exist.

    Attributes:
        what: the draft, in a sentence.
        step: the batch that trees are grown for.
        cost, kept, score: see `DraftModel`.
        model: of the forward passes.
        layers: its attention layers, by their names in vLLM's table of layers.
        own: those that are not the target's.
    """

    what: str
    step: Step
    cost = 0.0
    kept: Tensor | None = None
    score: Tensor | None = None

    def __init__(self, vllm_config: VllmConfig, req_states: RequestState) -> None:
        self.target_config, self.req_states = vllm_config, req_states
        self.max_len = req_states.max_model_len
        self.model: Any = None
        self.layers: list[str] = []
        self.own: list[str] = []

    @abstractmethod
    def load(self, target: nn.Module) -> None:
        """The target is loaded, its K/V caches are not made yet."""

    def warm(self, count: int) -> None:
        """A forward pass over `count` tokens that come to nothing: what is compiled is compiled then."""
        zeros = torch.zeros(count, dtype=torch.int64, device=self.req_states.device)
        self._run(zeros, zeros, None, None)

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Take the caches, the block table and the metadata builders of the draft's layers."""
        own = set(self.layers)
        groups = [i for i, group in enumerate(kv_cache_config.kv_cache_groups) if own & set(group.layer_names)]
        if len(groups) != 1:
            raise RuntimeError(
                f"--plugin: the layers of {self.what} stand in {len(groups)} K/V cache groups, not in one: use a model with "
                f"full attention in every layer"
            )
        (group,) = groups
        self.block_size = block_tables.block_sizes[group]
        self.table = block_tables.block_tables[group].gpu
        attn_groups, _, _ = init_attn_backend(
            kv_cache_config, self.target_config, self.table.device, active_layer_names=own
        )
        self.attn_groups = attn_groups[group]
        layers = self.target_config.compilation_config.static_forward_context
        self.caches = kv.distinct(layers[name].kv_cache for name in self.layers)

    def capture(self, steady: int) -> None:  # noqa: B027
        """Passes whose shapes are known are captured in full CUDA graphs. The caches are bound, and trees were grown once.

        Args:
            steady: no request has more tokens to be read when it was asked in the last step, and not in its prompt.
        """

    def release(self) -> None:  # noqa: B027
        """The captured graphs are dropped: other caches will be bound."""

    def add_request(self, slot: int, computed: int) -> None:  # noqa: B027
        """A request moves into `slot` with `computed` tokens in the prefix cache."""

    def stepped(self, slots: np.ndarray, most: np.ndarray) -> None:  # noqa: B027
        """The target has computed at most `most` [B] tokens of the requests in `slots` [B] that will be kept. Not told on a CPU,
        where what was kept is known.
        """

    def asked(self, slots: np.ndarray) -> None:  # noqa: B027
        """`begin` will be called for the requests in `slots` [B], on the host as on the device. Not told on a CPU."""

    @abstractmethod
    def begin(self, ctx: StepContext) -> Tensor:
        """See `DraftModel`."""

    def extend(self, tree: TokenTree, request: Tensor, row: Tensor) -> Tensor:
        """See `DraftModel`."""
        token = tree.tokens[request, row - 1]
        return self._grow(tree, request, row, token if loops_for(token) else token.clamp(min=0))

    def _grow(self, tree: TokenTree, request: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """[M, V] float32: the logits behind rows `row` [M] (0 = the root) of trees, which hold `token` [M]."""
        step, nodes, roots = self.step, tree.tokens.shape[1], self.step.roots
        place = roots[request] + row
        position = (roots[request] + tree.depth[request, row]).clamp(max=self.max_len - 1)
        slot = torch.where(place < self.max_len, self._slots(step.table, request, place), NO_SLOT)
        rows = TreeRows(
            num_tokens=len(row),
            request=request,
            prefix=roots,
            behind=(self.max_len - roots).clamp(max=nodes + 1),
            sees=tree.ancestors()[request, row],
            table=step.table,
            block_size=self.block_size,
        )
        return self.model.compute_logits(self._pass(token, position, rows, slot)).float()

    def _pass(self, token: Tensor, position: Tensor, rows: TreeRows, slot: Tensor) -> Tensor:
        """[M, H] hidden states of tree rows."""
        metadata = backend_of(slot.device).only_trees(rows, slot)
        return self._run(token, position, dict.fromkeys(self.layers, metadata), slot)

    def _slots(self, table: Tensor, request: Tensor, place: Tensor) -> Tensor:
        """[M] int64 slots of positions `place` [M] of requests `request` [M], rows of `table`."""
        index = (place // self.block_size).clamp(max=table.shape[1] - 1)
        return table[request, index].long() * self.block_size + place % self.block_size

    def _run(self, token: Tensor, position: Tensor, metadata: dict[str, Any] | None, slot: Tensor | None) -> Tensor:
        """[M, H] hidden states of one forward pass; without metadata there is no attention."""
        with set_forward_context(
            metadata,
            self.target_config,
            num_tokens=len(token),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=BatchDescriptor(num_tokens=len(token)),
            slot_mapping=None if slot is None else dict.fromkeys(self.layers, slot),
        ):
            return self._forward(token, position)

    def _forward(self, token: Tensor, position: Tensor) -> Tensor:
        """[M, H], inside the forward context."""
        hidden = self.model(input_ids=token.int(), positions=position)
        return hidden[0] if isinstance(hidden, tuple) else hidden


class LoadedDraft(PagedDraft):
    """A draft model of its own.

    Args:
        number: tells the layers of several draft models apart.
    """

    def __init__(self, vllm_config: VllmConfig, model: str, number: int, req_states: RequestState) -> None:
        super().__init__(vllm_config, req_states)
        self.model_name, self.number, self.what = model, number, f"draft model {model}"
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens

    def load(self, target: nn.Module) -> None:
        """Load the weights; the layers enter the target's table of layers."""
        kind: Any = AttentionLayerBase
        before = set(get_layers_from_vllm_config(self.target_config, kind))
        config = replace(
            self.target_config,
            model_config=model_config(self.target_config.model_config, self.model_name),
            quant_config=None,
        )
        with set_model_tag(f"draft_{self.number}"):
            self.model = get_model(vllm_config=config, prefix=f"draft_{self.number}")
        after = get_layers_from_vllm_config(self.target_config, kind)
        self.layers = self.own = [name for name in after if name not in before]

    def _known(
        self, bounds: Tensor, counts: np.ndarray, lengths: Tensor, longest: int, table: Tensor, slot: Tensor
    ) -> dict[str, Any]:
        """Causal attention of known tokens: `counts` [P] last ones of the first `lengths` [P] int32 of P requests, of which none
        has more than `longest`; `bounds` [P + 1] int32 on the host.
        """
        common = CommonAttentionMetadata(
            query_start_loc=bounds if slot.is_cpu else async_tensor_h2d(bounds, slot.device),
            query_start_loc_cpu=bounds,
            seq_lens=lengths,
            num_reqs=len(counts),
            num_actual_tokens=len(slot),
            max_query_len=int(counts.max()),
            max_seq_len=longest,
            block_table_tensor=table,
            slot_mapping=slot,
        )
        metadata: dict[str, Any] = {}
        for group in self.attn_groups:
            metadata |= dict.fromkeys(group.layer_names, group.get_metadata_builder(0).build(0, common))
        return metadata


class Drafter(LoadedDraft):
    """A draft model on the CPU, where the host knows what was accepted.

    Args:
        nodes: N, most nodes per tree.
    """

    def __init__(self, vllm_config: VllmConfig, model: str, number: int, req_states: RequestState, nodes: int) -> None:
        super().__init__(vllm_config, model, number, req_states)
        requests = req_states.max_num_reqs
        # Tokens whose K/V is there, per request: always a prefix.
        self.seen = np.zeros(requests, dtype=np.int64)
        # The nodes that the draft has got, and the root that they stand below; -1 = none.
        self.tokens = np.full((requests, nodes), -1, dtype=np.int64)
        self.parents = np.zeros((requests, nodes), dtype=np.int64)
        self.grown_at = np.full(requests, -1, dtype=np.int64)
        self.slots = np.zeros(0, dtype=np.int64)  # of the batch that trees are grown for

    def add_request(self, slot: int, computed: int) -> None:
        """A request moves into `slot` with `computed` tokens in the prefix cache, the draft's K/V with them."""
        self.seen[slot], self.grown_at[slot] = computed, -1

    def begin(self, ctx: StepContext) -> Tensor:
        slots = ctx.slots.numpy()
        emitted = ctx.num_emitted.numpy() > 0
        # A request inside its prompt has no root yet: the draft reads what the target has read.
        ends = self.req_states.num_computed_tokens.gpu.numpy()[slots].astype(np.int64) + emitted
        self._keep(slots, ends)
        self.slots, self.step = slots, Step(torch.from_numpy(ends - 1), self.table[ctx.slots])
        last: list[Tensor | None] = [None] * len(slots)
        first, todo = self.seen[slots], ends - self.seen[slots]
        while todo.any():
            room = np.maximum(self.max_tokens - (todo.cumsum() - todo), 0)
            count = np.minimum(todo, room)
            part = np.flatnonzero(count)
            hidden = self._read(part, first[part], count[part])
            for line, b in enumerate(part):
                last[b] = hidden[line]
            first, todo = first + count, todo - count
        self.seen[slots], self.grown_at[slots] = ends, np.where(emitted, ends - 1, -1)
        self.tokens[slots] = -1
        assert all(each is not None for each in last), "a request in the batch has no new token"
        return self.model.compute_logits(torch.stack(last)).float()  # type: ignore[arg-type]

    def extend(self, tree: TokenTree, request: Tensor, row: Tensor) -> Tensor:
        slots, nodes = self.slots, tree.tokens.shape[1]
        self.tokens[slots, :nodes], self.parents[slots, :nodes] = tree.tokens.numpy(), tree.parents.numpy()
        return super().extend(tree, request, row)

    def _keep(self, slots: np.ndarray, ends: np.ndarray) -> None:
        """Move the K/V of the nodes that have come true; the new roots are read anew, for their logits."""
        from vllm_spec_plugins.tree import loops

        known = self.req_states.all_token_ids.gpu.numpy()
        request, source, target, seen = loops.follow(
            self.tokens, self.parents, slots, self.grown_at, self.seen, ends, known, self.max_len
        )
        self.seen[slots] = seen
        if len(request):
            rows = torch.from_numpy(slots[request])
            kv.commit(
                self.caches, self.table[rows], self.block_size, torch.from_numpy(source), torch.from_numpy(target)
            )

    def _read(self, part: np.ndarray, first: np.ndarray, count: np.ndarray) -> Tensor:
        """Run known tokens through the draft: `count` of them from position `first` for requests `part` of the batch, all
        [P]. Returns [P, H], the hidden states of each one's last token.
        """
        starts = np.zeros(len(part) + 1, dtype=np.int32)
        np.cumsum(count, out=starts[1:])
        local = np.repeat(np.arange(len(part)), count)
        place = np.arange(starts[-1]) - starts[local] + first[local]
        token = self.req_states.all_token_ids.gpu.numpy()[self.slots[part][local], place]
        position, table = torch.from_numpy(place), self.step.table[torch.from_numpy(part)]
        slot = self._slots(table, torch.from_numpy(local), position)
        lengths = first + count
        bounds, seen = torch.from_numpy(starts), torch.from_numpy(lengths.astype(np.int32))
        metadata = self._known(bounds, count, seen, int(lengths.max()), table, slot)
        hidden = self._run(torch.from_numpy(token), position, metadata, slot)
        return hidden[bounds[1:].long() - 1]
