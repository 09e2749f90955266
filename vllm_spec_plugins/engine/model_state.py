# SPDX-License-Identifier: Apache-2.0
"""A model's ModelState with trees: positions, attention metadata, verification and K/V commit."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.engine import cascade, kv
from vllm_spec_plugins.engine.backend import backend_of
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.engine.state import StepTrees, TreeState
from vllm_spec_plugins.engine.tree_rows import TreeStep
from vllm_spec_plugins.registry import method_of
from vllm_spec_plugins.tree.accept import Acceptance

if TYPE_CHECKING:
    from vllm_spec_plugins.engine.speculator import TreeSpeculator


class TreeModelState(ModelState):
    """Mixin in front of the ModelState class that a model would get; keeps all that the class does."""

    state: TreeState

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        # One buffer for good: a replayed CUDA graph reads positions where it was captured, in every step.
        self._captured = vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)

    def custom_sampler(self, sampler: Sampler) -> tuple[Any, Any]:
        from vllm_spec_plugins.engine.sampler import TreeVerifier, confidence, likeliest

        # The target is loaded, its caches are not made yet: the moment for the models beside it.
        self.speculator: TreeSpeculator = cast("Any", sampler.req_states).speculator
        for drafter in self.speculator.drafters:
            drafter.load(self.model)
        self.state = cast("Any", sampler.req_states).tree_state
        settings = settings_of(self.vllm_config)
        assert settings is not None
        self._rule = method_of(settings).rule(settings)
        self.state.likeliest = partial(likeliest, sampler.sampling_states, self._rule.coupled)
        self.state.confidence_of = partial(confidence, sampler.sampling_states)
        return sampler, TreeVerifier(sampler, self.state, self._rule)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.state.add_request(req_index, new_req_data.prompt_len, new_req_data.num_computed_tokens)
        params, computed = new_req_data.sampling_params, new_req_data.num_computed_tokens
        if self.state.routes is not None:
            cascade.add(self.state.routes, req_index, params)
        length = new_req_data.prompt_len + ((params and params.max_tokens) or 0)
        hidden_size = self.vllm_config.model_config.get_hidden_size()
        self.state.searches.add(req_index, params, computed, length, hidden_size, self.device)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        slot = self.speculator.req_states.req_id_to_index.get(req_id)
        if slot is not None:
            self.state.searches.remove(slot)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._block_tables = block_tables
        self._commits: list[kv.PathCommit] = []  # per K/V cache group
        self._draft_layers = frozenset(name for drafter in self.speculator.drafters for name in drafter.own)
        layers = self.vllm_config.compilation_config.static_forward_context
        backend = backend_of(self.device)
        kinds = set()  # of cache layouts: the target's, and each draft model's
        for group in kv_cache_config.kv_cache_groups:
            for layer in (layers[name] for name in group.layer_names):
                kinds.add(backend.kind_of(layer, group.kv_cache_spec.block_size))
            own = [name for name in group.layer_names if name not in self._draft_layers]
            caches = kv.distinct(layers[name].kv_cache for name in own)
            self._commits.append(kv.PathCommit(caches, group.kv_cache_spec.block_size))
        for kind in kinds:
            backend.check_layout(*kind)
        for drafter in self.speculator.drafters:
            drafter.bind(kv_cache_config, block_tables)
        if loops_for(self.state.tokens) or kernels_for(self.state.tokens):
            self._warm()

    def _warm(self) -> None:
        """Run what is compiled when it is first run, before a request waits for it."""
        acceptance = self.speculator.warm(self._rule)
        if not loops_for(acceptance.path):
            nowhere = torch.zeros(1, dtype=torch.int64, device=acceptance.path.device)
            self._commit(nowhere, nowhere, acceptance)

    def _commit(self, slots: Tensor, root: Tensor, acceptance: Acceptance) -> None:
        """Move the accepted nodes' K/V of requests in `slots` [B] int64, whose roots stand at `root` [B] int64."""
        for group, move in enumerate(self._commits):
            table = self._block_tables.block_tables[group].gpu
            move(table, slots, root, acceptance.path, acceptance.num_accepted)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        self.state.begin_step(input_batch.idx_mapping, input_batch.num_draft_tokens_per_req)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if self.state.trees is not None:
            kwargs["model_specific_attn_metadata"] = TreeStep(self.state.trees)
        if self._draft_layers:  # their metadata is made when they run
            attn_groups = [
                [group for group in groups if not self._draft_layers.issuperset(group.layer_names)]
                for groups in attn_groups
            ]
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        trees = self.state.trees
        trees = trees if trees is not None and trees.branched else None  # a chain's rows stand where they are
        if trees is not None or self._captured:
            positions = self._positions[: input_batch.num_tokens_after_padding].copy_(input_batch.positions)
            inputs["positions"] = positions if trees is None else tree_positions(positions, trees, input_batch)
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self._positions[:num_tokens]} if self._captured else inputs

    def postprocess_state(
        self, idx_mapping: Tensor, num_sampled: Tensor, num_computed_tokens: Tensor | None = None
    ) -> None:
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        trees, verified = self.state.trees, self.state.verified
        if trees is None or verified is None or not trees.branched:  # what a chain accepts stands in its slots already
            return
        assert num_computed_tokens is not None
        root = num_computed_tokens[idx_mapping].long() - num_sampled.long()
        self._commit(idx_mapping, root, verified.acceptance)


def tree_positions(positions: Tensor, trees: StepTrees, batch: InputBatch) -> Tensor:
    """Rotary positions, in place: root + depth at tree rows. Slots were computed before and stay linear."""
    local = batch.expanded_local_pos.long()
    positions[batch.logits_indices] += trees.tree.depth[trees.request, local] - local
    return positions


def with_trees(base: type[ModelState]) -> type[ModelState]:
    """`base` behind the mixin."""
    return type(f"Tree{base.__name__}", (TreeModelState, base), {})
