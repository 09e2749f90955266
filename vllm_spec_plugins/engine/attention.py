# SPDX-License-Identifier: Apache-2.0
"""Tree attention on the CPU: vLLM's C++ kernel for rows without a tree, a compiled loop or torch for rows with one.

A tree row sees the prefix (everything before the root), its ancestors and itself. All of them stand in the K/V cache when
attention runs: each node has a slot of its own behind the root. So the rows need not be those of one tree in one forward
pass: a draft model grows its tree level by level, and each level sees the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
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

from vllm_spec_plugins.compiled import loops_for
from vllm_spec_plugins.engine.state import StepTrees
from vllm_spec_plugins.engine.tree_rows import DenseRows, TreeRows, foreign, tree_rows, unknown, without_trees

_NO_DEPTH = np.zeros(0, dtype=np.int64)


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata for the rows without a tree, and the tree rows in front of them."""

    tree: TreeRows | None = None


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


def only_trees(rows: TreeRows, slot_mapping: Tensor) -> TreeAttentionMetadata:
    """Metadata of a forward pass of tree rows alone; their K/V goes to `slot_mapping` [R] int64."""
    return TreeAttentionMetadata(
        num_actual_tokens=0,
        max_query_len=1,
        query_start_loc=slot_mapping[:0],
        max_seq_len=0,
        seq_lens=slot_mapping[:0],
        block_table=rows.table,
        slot_mapping=slot_mapping,
        scheduler_metadata=None,
        tree=rows,
    )


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, and tree attention for tree rows.

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
        window = max(self.sliding_window, 0)
        attend_tree(query[:tokens], kv_cache, tree, self.scale, self.logits_soft_cap, output[:tokens], window)
        return output


def attend_tree(
    query: Tensor,
    kv_cache: Tensor,
    tree: TreeRows,
    scale: float,
    soft_cap: float,
    output: Tensor,
    window: int = 0,
) -> None:
    """Attention of the tree rows over the paged cache, which holds the keys and values of this step already.

    Args:
        query: [R, H, D].
        kv_cache: [blocks, G, P, 2 * D], vLLM's "vec" layout: see `key_blocks`.
        output: [R, H, D] or [R, H * D], written.
        window: a row sees only the last `window` tokens, itself included; 0 = all. Its tree is always inside.
    """
    if kv_cache.dtype == torch.float32 and loops_for(query):
        from vllm_spec_plugins.cpu.kernels.tree_attention import attend

        blocks, groups, size, width = kv_cache.shape
        attend(
            query.contiguous().numpy(),
            kv_cache.view(blocks, groups, 2, size * width // 2).numpy(),
            tree.table.numpy(),
            tree.request.numpy(),
            tree.prefix.numpy(),
            tree.behind.numpy(),
            tree.sees.numpy(),
            tree.depth.numpy() if window else _NO_DEPTH,
            window,
            np.float32(scale),
            np.float32(soft_cap),
            output.view(query.shape).numpy(),
        )
        return
    output.copy_(attend_dense(query, kv_cache, tree.dense(window), scale, soft_cap).view_as(output))


def attend_dense(query: Tensor, kv_cache: Tensor, rows: DenseRows, scale: float, soft_cap: float) -> Tensor:
    """`attend_tree` in batched torch operations, for every dtype: [R, H, D]."""
    count, most = rows.row.shape
    num_blocks = rows.bias.shape[1]
    heads, dim = query.shape[1:]
    paged = kv_cache[rows.blocks]  # [T * M, G, P, 2 * D]
    keys, values = key_blocks(paged), value_blocks(paged)  # [T * M, G, D, P], [T * M, G, P, D]
    groups = keys.shape[1]
    per_group = heads // groups
    # [T, 1, G, (H / G) * S, D]: the heads that share keys and values stand in one matrix.
    q = query[rows.row].view(count, most, groups, per_group, dim).permute(0, 2, 3, 1, 4)
    q = (q * scale).reshape(count, 1, groups, per_group * most, dim)
    scores = torch.matmul(q, keys.unflatten(0, (count, num_blocks)))  # [T, M, G, (H / G) * S, P]
    if soft_cap:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    scores = scores.float().unflatten(3, (per_group, most)).add_(rows.bias.unsqueeze(3)).flatten(3, 4)
    scores = scores.sub_(scores.amax((1, 4), keepdim=True)).exp_()  # every row sees itself: the maximum is finite
    total = scores.sum((1, 4)).unsqueeze(3)
    out = torch.matmul(scores.to(values.dtype), values.unflatten(0, (count, num_blocks))).sum(1, dtype=torch.float32)
    out = (out / total).unflatten(2, (per_group, most)).permute(0, 3, 1, 2, 4).reshape(count * most, heads, dim)
    return out[rows.exists].to(query.dtype)


def key_blocks(kv_cache: Tensor) -> Tensor:
    """[blocks, G, D, P] view of the keys: the "vec" layout keeps each block's keys transposed."""
    blocks, groups, size, width = kv_cache.shape
    return kv_cache.view(blocks, groups, 2, size * width // 2)[:, :, 0].unflatten(2, (width // 2, size))


def value_blocks(kv_cache: Tensor) -> Tensor:
    """[blocks, G, P, D] view of the values."""
    blocks, groups, size, width = kv_cache.shape
    return kv_cache.view(blocks, groups, 2, size * width // 2)[:, :, 1].unflatten(2, (size, width // 2))


def kind_of(layer: Any, block_size: int) -> tuple[Any, ...]:
    """What `check_layout` has to be told of an attention layer. Raises RuntimeError when it is not ours, or attends in a way
    that tree attention has no code for.
    """
    impl = layer.impl
    if not isinstance(impl, TreeAttentionImpl):
        raise foreign(layer)
    if impl.attn_type != AttentionType.DECODER or impl.sinks is not None or impl.alibi_slopes is not None:
        raise unknown(layer)
    return layer.isa, block_size, impl.num_kv_heads, impl.head_size, layer.kv_cache.dtype


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
    # Compile the loop now, not in the first request's first step.
    one, none = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    sees, table = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int32)
    row = torch.zeros(1, groups, dim, dtype=dtype)
    attend_tree(row, cache, TreeRows(1, none, none, one, sees, table, block_size), 1.0, 0.0, torch.empty_like(row))


class TreeAttentionBackend(CPUAttentionBackend):
    """Registered in the place of vLLM's CPU backend: on the CPU a new name would be ignored."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return TreeAttentionBuilder
