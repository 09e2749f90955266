# SPDX-License-Identifier: Apache-2.0
"""SkipDecode in a step: every row runs the layers that its place in the answer gets, whatever the batch holds beside it.

A row must not run a layer that its own earlier tokens have skipped, since their K/V is not there; so the batch is never run as
deep as its deepest row. Each layer runs on the rows whose budgets reach it. Budgets never grow along a request, so these are the
first of its rows in the step, or none: together they are a smaller batch, with attention metadata of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.utils import AttentionGroup

from vllm_spec_plugins.config import FLAG
from vllm_spec_plugins.engine.layers import Layers, UnsupportedModel, skip_compiled
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.registry import method_of


@dataclass(eq=False)
class Step:
    """A step in which some row skips a layer. n rows, D different budgets among them.

    Attributes:
        batch: what is scheduled.
        budgets: [n] int64, layers of each row.
        levels: [D] int64, the different budgets, rising.
        rows: by number of a layer that not every row runs, [m] int64, those that do.
        slots: by name of its attention, [m] int64, where their K/V goes; left out where there are none.
    """

    batch: InputBatch
    budgets: np.ndarray
    levels: np.ndarray
    rows: dict[int, Tensor] = field(default_factory=dict)
    slots: dict[str, Tensor] = field(default_factory=dict)


class ScheduledModelState(ModelState):
    """Mixin in front of the ModelState class that a model would get; keeps all that the class does.

    Raises UnsupportedModel when part of the model cannot be run.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        settings = settings_of(vllm_config)
        assert settings is not None
        make = method_of(settings).schedule
        assert make is not None
        try:
            self.layers = Layers(model, vllm_config)
            self.layers.check_rows()
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{FLAG} {settings.title}: {error}") from error
        self.schedule = make(settings, len(self.layers))
        self._needs = np.array([self.schedule.needs(layer) for layer in range(len(self.layers))])
        self._no_rows = torch.zeros(0, dtype=torch.int64, device=device)
        self._prompt_len = np.zeros(self.max_num_reqs, dtype=np.int64)
        self._step: Step | None = None  # between its preparation and its forward pass
        self._running = ExitStack()
        # Inside the forward context that the runner makes, around the model that it calls, also where a pass fails.
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        # Not what is computed before the first new token: after preemption that ends with generated tokens.
        self._prompt_len[req_index] = new_req_data.prompt_len

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups = enumerate(kv_cache_config.kv_cache_groups)
        self._group = {name: number for number, group in groups for name in group.layer_names}

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        budgets = self.schedule.of_places(places(input_batch, self._prompt_len[input_batch.idx_mapping_np]))
        levels = np.unique(budgets)
        self._step = None if levels[0] >= self._needs.max() else Step(input_batch, budgets, levels)

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
        def prepare(batch: InputBatch, tables: tuple[Tensor, ...], slots: Tensor) -> dict[str, Any]:
            return super(ScheduledModelState, self).prepare_attn(
                batch, cudagraph_mode, tables, slots, attn_groups, kv_cache_config, **kwargs
            )

        metadata = prepare(input_batch, block_tables, slot_mappings)
        step = self._step
        if step is None or step.batch is not input_batch:  # no row of a dummy run has a place
            self._step = None
            return metadata
        parts: dict[int, tuple[Tensor, Tensor, dict[str, Any]]] = {}
        for layer, level in enumerate(np.searchsorted(step.levels, self._needs).tolist()):
            if level == 0:
                continue
            if level == len(step.levels):
                step.rows[layer] = self._no_rows
                continue
            if level not in parts:
                rows, requests, batch = part_of(input_batch, step.budgets >= step.levels[level])
                slots = slot_mappings[:, rows]
                parts[level] = rows, slots, prepare(batch, tuple(each[requests] for each in block_tables), slots)
            rows, slots, found = parts[level]
            name = self.layers.names[layer]
            step.rows[layer], step.slots[name], metadata[name] = rows, slots[self._group[name]], found[name]
        return metadata

    def _begin(self, model: nn.Module, args: Any) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        skip_compiled()
        slot_mapping = get_forward_context().slot_mapping
        assert isinstance(slot_mapping, dict)
        slot_mapping.update(step.slots)
        self._running.enter_context(self.layers.running_rows(step.rows))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._running.close()


def places(batch: InputBatch, prompt_len: np.ndarray) -> np.ndarray:
    """[n] int64, the place of each row in its request's answer, negative in the prompt; `prompt_len` [B]."""
    starts = batch.query_start_loc_np[: batch.num_reqs]
    first = batch.num_computed_tokens_np - prompt_len
    return np.repeat(first - starts, batch.num_scheduled_tokens) + np.arange(batch.num_tokens)


def part_of(batch: InputBatch, chosen: np.ndarray) -> tuple[Tensor, Tensor, InputBatch]:
    """The part of a batch that holds the `chosen` rows [n] bool: of each request the first ones, or none.

    Returns: [m] int64, the rows; [k] int64, the requests with any; a batch of these, as far as attention metadata looks.
    """
    device = batch.seq_lens.device
    counts = np.add.reduceat(chosen, batch.query_start_loc_np[: batch.num_reqs], dtype=np.int32)
    requests = np.flatnonzero(counts)
    counts = counts[requests]
    starts = np.zeros(len(requests) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    left = torch.from_numpy(batch.num_scheduled_tokens[requests] - counts)
    rows, which = torch.from_numpy(np.flatnonzero(chosen)), torch.from_numpy(requests)
    upper_bound = batch.seq_lens_cpu_upper_bound[which] - left
    rows, which = rows.to(device), which.to(device)
    part = replace(
        batch,
        num_reqs=len(requests),
        num_reqs_after_padding=len(requests),
        idx_mapping=batch.idx_mapping[which],
        idx_mapping_np=batch.idx_mapping_np[requests],
        num_scheduled_tokens=counts,
        num_tokens=len(rows),
        num_tokens_after_padding=len(rows),
        query_start_loc=torch.from_numpy(starts).to(device),
        query_start_loc_np=starts,
        seq_lens=batch.seq_lens[which] - left.to(device),
        seq_lens_cpu_upper_bound=upper_bound,
        num_computed_tokens_np=batch.num_computed_tokens_np[requests],
        is_prefilling_np=batch.is_prefilling_np[requests],
        positions=batch.positions[rows],
        max_query_len=None,
    )
    return rows, which, part


def with_schedule(base: type[ModelState]) -> type[ModelState]:
    """`base` behind the mixin."""
    return type(f"Scheduled{base.__name__}", (ScheduledModelState, base), {})
