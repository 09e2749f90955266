# SPDX-License-Identifier: Apache-2.0
"""Tree attention on the CPU: vLLM's C++ kernel for rows without a tree, batched torch for rows with one.

A tree row sees the prefix (everything before the root), its ancestors and itself. The prefix needs no mask but its
length, the tree part is one dense [N + 1, N + 1] mask per request; both are made once per step and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_spec_plugins.engine.state import StepTrees


@dataclass(eq=False)
class TreeRows:
    """Which rows of the batch are tree rows, and what they see. T requests, S rows at most, K/V blocks of size P.

    Attributes:
        num_tokens: query rows of the T requests; they stand first in the batch.
        row: [T, S] int64, query row of each tree row; rows that do not exist point at the request's root.
        exists: [num_tokens] int64, index into the flattened [T, S] of each query row.
        prefix_bias: [T, M, 1, 1, P] float32, 0 where a token of the prefix stands, -inf behind it.
        tree_bias: [T, 1, S, S] float32, 0 where row s sees row s', else -inf.
        blocks: [T * M] int64, K/V blocks of the prefixes, row-major; a slice when they are consecutive (no copy).
        shape: (T, S, M).
    """

    num_tokens: int
    row: Tensor
    exists: Tensor
    prefix_bias: Tensor
    tree_bias: Tensor
    blocks: Tensor | slice
    shape: tuple[int, int, int]


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata for the rows without a tree, and the tree rows in front of them."""

    tree: TreeRows | None = None


class TreeStep(ModelSpecificAttnMetadata):
    """Carries one step's trees to the metadata builders."""

    def __init__(self, trees: StepTrees) -> None:
        self.trees = trees

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"trees": self.trees}


class TreeAttentionBuilder(CPUAttentionMetadataBuilder):
    """Builds the tree part once per step and K/V cache group."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        trees: StepTrees | None = None,
    ) -> CPUAttentionMetadata:
        if trees is None or not trees.branched:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        tree = tree_rows(trees, common_attn_metadata, self.block_size)
        rest = without_trees(common_attn_metadata, trees.num_trees, tree.num_tokens)
        if rest is None:
            plain: dict[str, Any] = {**vars(common_attn_metadata), "num_actual_tokens": 0}
        else:
            plain = vars(super().build(common_prefix_len, rest, fast_build))
        kept = TreeAttentionMetadata.__dataclass_fields__
        plain = {key: value for key, value in plain.items() if key in kept}
        if rest is None:
            plain |= {"block_table": common_attn_metadata.block_table_tensor, "scheduler_metadata": None}
        # The K/V of every row, tree or not, is written through the one slot mapping.
        plain["slot_mapping"] = common_attn_metadata.slot_mapping
        return TreeAttentionMetadata(**plain, tree=tree)


def tree_rows(trees: StepTrees, common: CommonAttentionMetadata, block_size: int) -> TreeRows:
    """The tree part of a step's metadata. Host-side arithmetic on the CPU; nothing here runs on a GPU."""
    count = trees.num_trees
    rows = torch.from_numpy(trees.num_rows[:count])
    starts = common.query_start_loc[:count].long()
    most_rows = int(rows.max())
    num_tokens = int(common.query_start_loc[count])
    place = torch.arange(most_rows)
    real = place < rows.unsqueeze(1)  # [T, S]
    row = torch.where(real, starts.unsqueeze(1) + place, starts.unsqueeze(1))
    if num_tokens != int(rows.sum()):
        raise RuntimeError(
            f"{num_tokens} query rows for trees of {int(rows.sum())} rows: a request with drafts holds others"
        )

    prefix = common.seq_lens[:count].long() - rows  # [T], tokens before the root
    num_blocks = max(1, -(-int(prefix.max()) // block_size))
    table = common.block_table_tensor[:count, :num_blocks].long()
    position = torch.arange(num_blocks * block_size)
    hidden = position >= prefix.unsqueeze(1)
    # Blocks behind a shorter prefix may not exist yet: read block 0 (vLLM's null block) under the mask.
    table = table.masked_fill(position[::block_size] >= prefix.unsqueeze(1), 0)
    prefix_bias = torch.zeros(count, num_blocks * block_size).masked_fill_(hidden, float("-inf"))

    sees = trees.tree.ancestors()[:count, :most_rows, :most_rows]
    tree_bias = torch.full(sees.shape, float("-inf")).masked_fill_(sees, 0.0)
    return TreeRows(
        num_tokens=num_tokens,
        row=row,
        exists=real.view(-1).nonzero().squeeze(1),
        prefix_bias=prefix_bias.view(count, num_blocks, 1, 1, block_size),
        tree_bias=tree_bias.unsqueeze(1),
        blocks=_consecutive(table.reshape(-1)),
        shape=(count, most_rows, num_blocks),
    )


def _consecutive(blocks: Tensor) -> Tensor | slice:
    """A slice when the block numbers count up by one (a request alone on the machine, mostly): a view, not a copy."""
    first = int(blocks[0])
    if bool((blocks == torch.arange(first, first + len(blocks))).all()):
        return slice(first, first + len(blocks))
    return blocks


def without_trees(common: CommonAttentionMetadata, count: int, num_tokens: int) -> CommonAttentionMetadata | None:
    """The batch behind its first `count` requests, or None when nothing is left."""
    if common.num_reqs == count:
        return None
    starts = common.query_start_loc[count:] - num_tokens
    lengths = starts.diff()
    return replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[count:],
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - num_tokens,
        max_query_len=int(lengths.max()),
        max_seq_len=int(common.seq_lens[count:].max()),
        block_table_tensor=common.block_table_tensor[count:],
    )


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, with tree rows computed in torch.

    The common case of vLLM's two methods, a decoder without sinks, is called directly with views of the K/V cache that
    are made once: making them takes 4 us, twice per layer and step, which is 2% of a tiny model's step.
    """

    _cache: Tensor | None = None
    _keys_values: tuple[Tensor, Tensor]

    def _halves(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as vLLM's kernels take them: two [blocks, G, P, D] views of [blocks, G, P, 2 * D]."""
        if self._cache is not kv_cache:
            blocks, groups, size, _ = kv_cache.shape
            keys, values = kv_cache.view(blocks, groups, 2 * size, -1).chunk(2, dim=2)
            self._cache, self._keys_values = kv_cache, (keys, values)
        return self._keys_values

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.attn_type != AttentionType.DECODER:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            *self._halves(kv_cache),
            slot_mapping,
            layer.isa,
            layer._k_scale_float,
            layer._v_scale_float,
            self.kv_cache_dtype,
        )

    def _attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: CPUAttentionMetadata, output: Tensor
    ) -> None:
        keys, values = self._halves(kv_cache)
        ops.cpu_attention_with_kv_cache(
            query,
            keys,
            values,
            output,
            metadata.query_start_loc,
            metadata.seq_lens,
            self.scale,
            metadata.causal,
            self.alibi_slopes,
            self.sliding_window,
            metadata.block_table,
            self.logits_soft_cap,
            metadata.scheduler_metadata,
            None,
            metadata.dynamic_causal,
            layer._k_scale_float,
            layer._v_scale_float,
            self.kv_cache_dtype,
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        tree = attn_metadata.tree if isinstance(attn_metadata, TreeAttentionMetadata) else None
        if tree is None:
            usual = self.attn_type == AttentionType.DECODER and self.sinks is None and output_scale is None
            if attn_metadata is not None and usual and output_block_scale is None:
                rows = attn_metadata.num_actual_tokens
                whole = rows == len(query)
                self._attend(
                    layer,
                    query if whole else query[:rows],
                    kv_cache,
                    attn_metadata,
                    output if whole else output[:rows],
                )
                return output
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert attn_metadata is not None
        tokens, end = tree.num_tokens, tree.num_tokens + attn_metadata.num_actual_tokens
        if end > tokens:
            super().forward(
                layer, query[tokens:end], key[tokens:end], value[tokens:end], kv_cache, attn_metadata,
                output[tokens:end], output_scale, output_block_scale,
            )  # fmt: skip
        output[:tokens] = attend_tree(query, key, value, kv_cache, tree, self.scale, self.logits_soft_cap).view_as(
            output[:tokens]
        )
        return output


def attend_tree(
    query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, tree: TreeRows, scale: float, soft_cap: float
) -> Tensor:
    """Attention of the tree rows over their prefixes (paged) and their trees (this step's keys and values).

    Args:
        query: [rows, H, D]; key, value: [rows, G, D], rows of this step.
        kv_cache: [blocks, G, P, 2 * D], vLLM's "vec" layout: see `kv.key_blocks`.

    Returns:
        [tree.num_tokens, H, D]. Two softmax parts, prefix and tree, under one maximum and one sum.
    """
    count, rows, num_blocks = tree.shape
    heads, dim = query.shape[1:]
    groups = key.shape[1]
    per_group = heads // groups

    paged = kv_cache[tree.blocks]  # [T * M, G, P, 2 * D]
    keys, values = key_blocks(paged), value_blocks(paged)  # [T * M, G, D, P], [T * M, G, P, D]
    # [T, G, (H / G) * S, D]: the heads that share keys and values stand in one matrix.
    q = query[tree.row].view(count, rows, groups, per_group, dim).permute(0, 2, 3, 1, 4)
    q = (q * scale).reshape(count, groups, per_group * rows, dim)
    k, v = key[tree.row].permute(0, 2, 3, 1), value[tree.row].permute(0, 2, 1, 3)  # [T, G, D, S], [T, G, S, D]

    on_prefix = torch.matmul(q.unsqueeze(1), keys.unflatten(0, (count, num_blocks)))  # [T, M, G, (H / G) * S, P]
    on_tree = torch.matmul(q, k)  # [T, G, (H / G) * S, S]
    if soft_cap:
        on_prefix = torch.tanh(on_prefix / soft_cap) * soft_cap
        on_tree = torch.tanh(on_tree / soft_cap) * soft_cap
    on_prefix = on_prefix.float().add_(tree.prefix_bias)
    on_tree = on_tree.float().unflatten(2, (per_group, rows)).add_(tree.tree_bias.unsqueeze(1)).flatten(2, 3)

    # Every row sees itself, so the maximum is finite.
    most = torch.maximum(on_prefix.amax((1, 4)), on_tree.amax(3)).unsqueeze(3)  # [T, G, (H / G) * S, 1]
    on_prefix = on_prefix.sub_(most.unsqueeze(1)).exp_()
    on_tree = on_tree.sub_(most).exp_()
    total = on_prefix.sum((1, 4)) + on_tree.sum(3)
    out = torch.matmul(on_prefix.to(values.dtype), values.unflatten(0, (count, num_blocks))).sum(1, dtype=torch.float32)
    out += torch.matmul(on_tree.to(v.dtype), v)
    out /= total.unsqueeze(3)
    out = out.unflatten(2, (per_group, rows)).permute(0, 3, 1, 2, 4).reshape(count * rows, heads, dim)
    return out[tree.exists].to(query.dtype)


def key_blocks(kv_cache: Tensor) -> Tensor:
    """[blocks, G, D, P] view of the keys: the "vec" layout keeps each block's keys transposed."""
    blocks, groups, size, width = kv_cache.shape
    return kv_cache.view(blocks, groups, 2, size * width // 2)[:, :, 0].unflatten(2, (width // 2, size))


def value_blocks(kv_cache: Tensor) -> Tensor:
    """[blocks, G, P, D] view of the values."""
    blocks, groups, size, width = kv_cache.shape
    return kv_cache.view(blocks, groups, 2, size * width // 2)[:, :, 1].unflatten(2, (size, width // 2))


def check_layout(isa: str, block_size: int, groups: int, dim: int, dtype: torch.dtype) -> None:
    """Write through vLLM's kernel, read through our views. Raises RuntimeError when the layout is another one."""
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * block_size
    key, value = (torch.randn(tokens, groups, dim, generator=generator).to(dtype) for _ in range(2))
    cache = torch.zeros(2, groups, block_size, 2 * dim, dtype=dtype)
    halves = cache.view(2, groups, 2 * block_size, dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, torch.arange(tokens), isa)
    keys = key_blocks(cache).permute(0, 3, 1, 2).reshape(tokens, groups, dim)
    values = value_blocks(cache).transpose(1, 2).reshape(tokens, groups, dim)
    if not (torch.equal(keys, key) and torch.equal(values, value)):
        raise RuntimeError(
            f"--plugin: the K/V cache layout of this CPU ({isa}, {dtype}, blocks of {block_size}) is not the one that "
            f"tree attention reads; use --dtype float32 with a --block-size that is a multiple of 32"
        )


class TreeAttentionBackend(CPUAttentionBackend):
    """Registered in the place of vLLM's CPU backend: on the CPU a new name would be ignored."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return TreeAttentionBuilder
