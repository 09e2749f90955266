# SPDX-License-Identifier: Apache-2.0
"""At the start of an engine: the kernels of a step, on its device, against their references, on one small random case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

from vllm_spec_plugins.engine.triton_attention import keys_values
from vllm_spec_plugins.kernels import kv_commit, tree_attention, tree_walk
from vllm_spec_plugins.tree.tree import TokenTree

# Requests with these tokens before the root; all have trees of so many nodes.
CONTEXTS, NODES = (19, 3), 4
# What keys and values of 8 bits are to be multiplied by.
SCALES = (0.25, 2.0)


def check(
    device: torch.device,
    block_size: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    heads_apart: bool,
    window: int = 0,
    cache_dtype: str = "auto",
) -> None:
    """Raises RuntimeError when a kernel and its reference, or vLLM's K/V layout and our views of it, do not agree.

    Args:
        dtype: of queries, keys and values, before those are written to the cache.
        heads_apart: whether the cache keeps a block's tokens of one head together, or its heads of one token.
        window: how many tokens a row sees, itself included; 0 = all.
        cache_dtype: vLLM's name for what the cache holds: "fp8", or `dtype` under any name.
    """
    stored = torch.uint8 if is_quantized_kv_cache(cache_dtype) else dtype
    generator = torch.Generator().manual_seed(0)
    tree = _tree(generator)
    found = {
        "tree attention": _attention(
            tree, generator, device, block_size, heads, groups, dim, dtype, heads_apart, window, cache_dtype
        ),
        "the walk": _walk(tree, generator, device),
        "the move of K/V": _commit(generator, device, block_size, groups, dim, stored, heads_apart),
    }
    if wrong := [name for name, agrees in found.items() if not agrees]:
        raise RuntimeError(
            f"--plugin: {' and '.join(wrong)} computes on {device} something else than its reference does ({dtype}, {heads} "
            f"heads of {dim}, {groups} of keys, blocks of {block_size}, --kv-cache-dtype {cache_dtype}): serve the model with "
            f"--plugin none there"
        )


def _tree(generator: torch.Generator) -> TokenTree:
    count = len(CONTEXTS)
    parents = torch.stack([torch.randint(0, node + 1, (count,), generator=generator) for node in range(NODES)], 1)
    return TokenTree(torch.randint(0, 3, (count, NODES), generator=generator), parents)


def _attention(
    tree: TokenTree,
    generator: torch.Generator,
    device: torch.device,
    size: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    heads_apart: bool,
    window: int,
    cache_dtype: str,
) -> bool:
    """Keys and values are written by vLLM's own kernel: the layout is checked with the attention."""
    scaled = is_quantized_kv_cache(cache_dtype)
    random = partial(torch.randn, generator=generator)
    count, rows = len(CONTEXTS), NODES + 1
    contexts = (window + CONTEXTS[0], *CONTEXTS[1:])  # a request that has outgrown its window, and one that has not
    blocks = -(-(max(contexts) + rows) // size)
    cache = _cache(1 + count * blocks, size, groups, dim, torch.uint8 if scaled else dtype, device, heads_apart)
    keys, values = keys_values(cache, dim, cache_dtype)
    table = 1 + torch.randperm(count * blocks, generator=generator).view(count, blocks)
    position = [torch.arange(context + rows) for context in contexts]
    slots = torch.cat([table[b, place // size] * size + place % size for b, place in enumerate(position)])
    written = [random(len(slots), groups, dim).to(device, dtype) for _ in range(2)]
    scales = [torch.tensor(scale if scaled else 1.0, device=device) for scale in SCALES]
    at = slots.to(device)
    triton_reshape_and_cache_flash(*written, *cache.transpose(1, 2).split(dim, -1), at, cache_dtype, *scales)
    near = (2**-4, 2**-10) if scaled else (0.0, 0.0)  # 8 bits: three behind the first one, and none below 2^-9
    for part, scale, source in zip((keys, values), scales, written, strict=True):
        if not torch.allclose(part.float()[at // size, at % size], source.float() / scale, *near):
            return False

    query = random(count * rows, heads, dim).to(device, dtype)
    given: dict[str, Any] = {
        "start": torch.arange(count + 1, dtype=torch.int32, device=device) * rows,
        "prefix": torch.tensor(contexts, dtype=torch.int32, device=device),
        "behind": torch.full((count,), rows, dtype=torch.int32, device=device),
        "words": tree.ancestor_words().flatten(0, 1).to(device),
        "block_table": table.int().to(device),
        "max_rows": rows,
        "scale": dim**-0.5,
        "window": window,
        "depth": tree.depth.flatten().int().to(device) if window else None,
    }
    if scaled:
        given |= {"k_scale": scales[0], "v_scale": scales[1]}

    def run(attend: Callable[..., None], *cached: Tensor) -> Tensor:
        out = torch.full_like(query, float("nan"))
        attend(query, *cached, out, **given)
        return out.float()

    close = 1e-4 if dtype == torch.float32 else 3e-2
    found = run(tree_attention.tree_attention, keys, values)
    return torch.allclose(found, run(tree_attention.reference, keys.float(), values.float()), rtol=close, atol=close)


def _cache(
    blocks: int, size: int, groups: int, dim: int, dtype: torch.dtype, device: torch.device, heads_apart: bool
) -> Tensor:
    """[blocks, G, P, 2 * D], laid out as the engine's."""
    if heads_apart:
        return torch.zeros(blocks, groups, size, 2 * dim, dtype=dtype, device=device)
    return torch.zeros(blocks, size, groups, 2 * dim, dtype=dtype, device=device).transpose(1, 2)


def _commit(
    generator: torch.Generator,
    device: torch.device,
    size: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    heads_apart: bool,
) -> bool:
    """Rows 2 and 4 of the first tree, and row 1 of the second, which stands where it belongs."""
    blocks = 1 + -(-(max(CONTEXTS) + NODES + 1) // size)
    shape = (len(CONTEXTS) * blocks, groups, size, 2 * dim)
    written = torch.randint(128, shape, generator=generator).to(device, dtype)  # which every type has

    def run(commit: Callable[..., None]) -> Tensor:
        cache = _cache(len(written), size, groups, dim, dtype, device, heads_apart).copy_(written)
        commit(
            kv_commit.Pointers.of([cache]),
            torch.arange(len(written), dtype=torch.int32, device=device).view(len(CONTEXTS), blocks),
            torch.tensor(CONTEXTS, device=device),
            torch.tensor([[2, 4], [1, 0]], device=device),
            torch.tensor([2, 1], device=device),
        )
        return cache

    moved = run(kv_commit.kv_commit)
    return torch.equal(moved, run(kv_commit.kv_commit_reference)) and not torch.equal(moved, written)


def _walk(tree: TokenTree, generator: torch.Generator, device: torch.device) -> bool:
    drawn = torch.randint(0, 3, (len(CONTEXTS), NODES + 1), generator=generator).to(device)
    given = (tree.tokens.to(device), tree.parents.to(device), drawn, NODES)
    pairs = zip(tree_walk.tree_walk(*given), tree_walk.tree_walk_reference(*given), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)
