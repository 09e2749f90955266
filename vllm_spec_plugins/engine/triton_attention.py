# SPDX-License-Identifier: Apache-2.0
"""Tree attention where there is Triton: vLLM's Triton kernels for rows without a tree, ours for rows with one.

What the kernel is told of a step stands in buffers that are made once and written in place. A CUDA graph is captured with
trees that are chains and replayed with whatever trees the buffers hold then: that a request has no tree is data, not a
branch. Nothing here waits for the device; what has to be known on the host is what the scheduler told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_spec_plugins import compiled
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.engine.state import StepTrees
from vllm_spec_plugins.engine.tree_rows import TreeRows, foreign, unknown, without_trees
from vllm_spec_plugins.kernels.tree_attention import tree_attention
from vllm_spec_plugins.tree.tree import as_words


@dataclass(eq=False)
class KernelRows:
    """The tree rows as the kernel takes them: R rows of T requests, which stand first in the batch, request by request.

    Attributes:
        num_tokens: R, or more where the batch of a CUDA graph is padded: rows behind the last request's are left alone.
        max_rows: no request has more rows.
        start: [T + 1] int32, first row of each request.
        prefix: [T] int32, tokens before the root: all rows of the request see them.
        behind: [T] int32, tokens of the tree that stand in the cache behind the prefix, the root first.
        words: [R, W] int64, which of those a row sees, as bits.
        table: [T, M] int32, the requests' K/V blocks.
        depth: [R] int32, depth of each row in its tree; None where no layer has a window.
    """

    num_tokens: int
    max_rows: int
    start: Tensor
    prefix: Tensor
    behind: Tensor
    words: Tensor
    table: Tensor
    depth: Tensor | None = None


@dataclass(eq=False)
class TritonTreeMetadata:
    """The tree rows, and vLLM's metadata for the rows behind them; None where there are none."""

    tree: KernelRows
    rest: TritonAttentionMetadata | None = None


class TritonTreeBuilder(TritonAttentionMetadataBuilder):
    """Builds the tree part once per step and K/V cache group.

    Attributes:
        words: [most tokens, W] int64; prefix, behind: [most requests] int32; depth: [most tokens] int32, or None: see
            `KernelRows`, whose tensors are views of them.
        chain: [N + 1, W] int64, the words of a request without a tree: row i sees rows 0 to i.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler, rows = vllm_config.scheduler_config, vllm_config.num_speculative_tokens + 1
        self.chain = as_words(torch.ones(rows, rows, dtype=torch.bool, device=device).tril())
        tokens, requests = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        self.words = torch.zeros(tokens, self.chain.shape[1], dtype=torch.int64, device=device)
        self.prefix, self.behind = (torch.zeros(requests, dtype=torch.int32, device=device) for _ in range(2))
        layers = vllm_config.compilation_config.static_forward_context
        windows = any(window_of(layers[name].impl) for name in layer_names)
        self.depth = torch.zeros(tokens, dtype=torch.int32, device=device) if windows else None
        self._place = torch.arange(tokens, device=device)
        if compiled.use_kernels:  # interpreted, a context in parts is only more work
            self.seq_threshold_3D = 0

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        trees: StepTrees | None = None,
    ) -> Any:
        if trees is None or not trees.branched:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common, count = common_attn_metadata, trees.num_trees
        num_tokens, held = int(trees.num_rows[:count].sum()), int(common.query_start_loc_cpu[count])
        if held != num_tokens:
            raise RuntimeError(f"{held} query rows for trees of {num_tokens} rows: a request with drafts holds others")
        request = trees.request[:num_tokens]
        local = self._place[:num_tokens] - common.query_start_loc[request]
        self.words[:num_tokens] = trees.tree.ancestor_words()[request, local]
        if self.depth is not None:
            self.depth[:num_tokens] = trees.tree.depth[request, local]
        if int(common.query_start_loc_cpu[-1]) == num_tokens:  # requests that pad the batch of a graph have no rows
            return self._trees(common, common.num_reqs, common.num_actual_tokens, common.max_query_len)
        metadata = self._trees(common, count, num_tokens, int(trees.num_rows[:count].max()))
        rest = without_trees(common, count, num_tokens)
        assert rest is not None
        metadata.rest = super().build(common_prefix_len, rest, fast_build)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Chains in the place of the trees that replays will find there. Full graphs hold uniform batches only: N drafts in
        every request.
        """
        common, rows = common_attn_metadata, len(self.chain)
        if common.num_actual_tokens != common.num_reqs * rows:
            raise RuntimeError(
                f"a CUDA graph of {common.num_reqs} requests with {common.num_actual_tokens} rows cannot verify trees of "
                f"{rows} rows each"
            )
        words = self.words[: common.num_actual_tokens]
        words.view(common.num_reqs, rows, -1).copy_(self.chain)
        if self.depth is not None:
            self.depth[: common.num_actual_tokens].view(common.num_reqs, rows).copy_(self._place[:rows])
        return self._trees(common, common.num_reqs, common.num_actual_tokens, rows)

    def _trees(self, common: CommonAttentionMetadata, count: int, num_tokens: int, max_rows: int) -> TritonTreeMetadata:
        """Metadata of the first `count` requests, whose words are written."""
        start, prefix, behind = common.query_start_loc[: count + 1], self.prefix[:count], self.behind[:count]
        torch.sub(start[1:], start[:-1], out=behind)
        torch.sub(common.seq_lens[:count], behind, out=prefix)
        return TritonTreeMetadata(
            KernelRows(
                num_tokens=num_tokens,
                max_rows=max_rows,
                start=start,
                prefix=prefix,
                behind=behind,
                words=self.words[:num_tokens],
                table=common.block_table_tensor[:count],
                depth=None if self.depth is None else self.depth[:num_tokens],
            )
        )


def window_of(impl: Any) -> int:
    """How many tokens a row of a layer sees, itself included; 0 = all."""
    return int(impl.sliding_window[0]) + 1


def only_trees(rows: TreeRows, slot_mapping: Tensor) -> TritonTreeMetadata:
    """Metadata of a forward pass of tree rows alone; their K/V goes to `slot_mapping` [R] int64."""
    count = len(rows.prefix)
    bounds = torch.arange(count + 1, device=slot_mapping.device)
    return TritonTreeMetadata(
        KernelRows(
            num_tokens=rows.num_tokens,
            max_rows=min(rows.num_tokens, rows.sees.shape[1]),
            start=torch.searchsorted(rows.request, bounds, out_int32=True),
            prefix=rows.prefix.int(),
            behind=rows.behind.int(),
            words=as_words(rows.sees),
            table=rows.table,
        )
    )


def keys_values(kv_cache: Tensor, dim: int, cache_dtype: str) -> tuple[Tensor, Tensor]:
    """Two [blocks, P, G, D] views of [blocks, G, P, 2 * D]. vLLM allocates a cache of 8-bit floats as bytes."""
    if is_quantized_kv_cache(cache_dtype):
        kv_cache = kv_cache.view(current_platform.fp8_dtype())
    keys, values = kv_cache.transpose(1, 2).split(dim, dim=-1)
    return keys, values


class TritonTreeImpl(TritonAttentionImpl):
    """vLLM's Triton attention, and tree attention for tree rows.

    Attributes:
        scaled: the cache holds 8-bit floats, to be multiplied by the layer's scales.
    """

    _cache: Tensor | None = None
    _keys_values: tuple[Tensor, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scaled = is_quantized_kv_cache(self.kv_cache_dtype)
        # With a quantised query vLLM's kernel rounds queries and probabilities to 8 bits. The tree kernel does not, and a
        # token's row is one with a tree in one engine and one without in another: here all multiply in the query's own type.
        if self.scaled and settings_of(get_current_vllm_config()) is not None:
            self.supports_quant_query_input = False

    def _halves(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer's cache, made once."""
        if self._cache is not kv_cache:
            self._cache, self._keys_values = kv_cache, keys_values(kv_cache, self.head_size, self.kv_cache_dtype)
        return self._keys_values

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attn_metadata, TritonTreeMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert output_scale is None and output_block_scale is None
        tree, rest = attn_metadata.tree, attn_metadata.rest
        keys, values = self._halves(kv_cache)
        tree_attention(
            query[: tree.num_tokens],
            keys,
            values,
            output[: tree.num_tokens],
            start=tree.start,
            prefix=tree.prefix,
            behind=tree.behind,
            words=tree.words,
            block_table=tree.table,
            max_rows=tree.max_rows,
            scale=self.scale,
            soft_cap=self.logits_soft_cap,
            window=window_of(self),
            depth=tree.depth,
            # The layer's own tensors: when weights are loaded, others may take their place.
            k_scale=layer._k_scale if self.scaled else None,
            v_scale=layer._v_scale if self.scaled else None,
        )
        if rest is not None:
            part = slice(tree.num_tokens, tree.num_tokens + rest.num_actual_tokens)
            super().forward(layer, query[part], key[part], value[part], kv_cache, rest, output[part])
        return output


class TritonTreeBackend(TritonAttentionBackend):
    """Registered in the place of vLLM's Triton backend; under the interpreter, in that of its CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return TritonTreeImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return TritonTreeBuilder


def kind_of(layer: Any, block_size: int) -> tuple[Any, ...]:
    """What `check_layout` has to be told of an attention layer. Raises RuntimeError when it is not ours, or attends in a way
    that the kernel has no code for.
    """
    impl = layer.impl
    if not isinstance(impl, TritonTreeImpl):
        raise foreign(layer)
    if impl.attn_type != AttentionType.DECODER or impl.sinks is not None or impl.alibi_slopes is not None:
        raise unknown(layer)
    heads_apart = layer.kv_cache.stride(1) > layer.kv_cache.stride(2)
    cache = layer.kv_cache
    shape = (impl.num_heads, impl.num_kv_heads, impl.head_size)
    return cache.device, block_size, *shape, layer.dtype, heads_apart, window_of(impl), impl.kv_cache_dtype


def check_layout(*kind: Any) -> None:
    """See `self_check.check`, whose arguments `kind_of` gives."""
    from vllm_spec_plugins.engine.self_check import check

    check(*kind)
