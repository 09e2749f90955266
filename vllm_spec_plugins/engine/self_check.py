# SPDX-License-Identifier: Apache-2.0
"""At the start of an engine: the kernels of a step, on its device, against their references, on one small random case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

from vllm_spec_plugins.kernels import kv_commit, tree_attention, tree_walk
from vllm_spec_plugins.tree.tree import TokenTree

# Requests with these tokens before the root; all have trees of so many nodes.
CONTEXTS, NODES = (19, 3), 4


def check(
    device: torch.device,
    block_size: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    heads_apart: bool,
    window: int = 0,
) -> None:
    """Raises RuntimeError when a kernel and its reference, or vLLM's K/V layout and our views of it, do not agree.

    Args:
        heads_apart: whether the cache keeps a block's tokens of one head together, or its heads of one token.
        window: how many tokens a row sees, itself included; 0 = all.
    """
    generator = torch.Generator().manual_seed(0)
    tree = _tree(generator)
    found = {
        "tree attention": _attention(
            tree, generator, device, block_size, heads, groups, dim, dtype, heads_apart, window
        ),
        "the walk": _walk(tree, generator, device),
        "the move of K/V": _commit(generator, device, block_size, groups, dim, dtype, heads_apart),
    }
    if wrong := [name for name, agrees in found.items() if not agrees]:
        raise RuntimeError(
            f"--plugin: {' and '.join(wrong)} computes on {device} something else than its reference does ({dtype}, {heads} "
            f"heads of {dim}, {groups} of keys, blocks of {block_size}): serve the model with --plugin none there"
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
) -> bool:
    """Keys and values are written by vLLM's own kernel: the layout is checked with the attention."""
    random = partial(torch.randn, generator=generator)
    count, rows = len(CONTEXTS), NODES + 1
    contexts = (window + CONTEXTS[0], *CONTEXTS[1:])  # a request that has outgrown its window, and one that has not
    blocks = -(-(max(contexts) + rows) // size)
    cache = _cache(1 + count * blocks, size, groups, dim, dtype, device, heads_apart)
    keys, values = cache.transpose(1, 2).split(dim, -1)
    table = 1 + torch.randperm(count * blocks, generator=generator).view(count, blocks)
    position = [torch.arange(context + rows) for context in contexts]
    slots = torch.cat([table[b, place // size] * size + place % size for b, place in enumerate(position)])
    written = [random(len(slots), groups, dim).to(device, dtype) for _ in range(2)]
    one = torch.ones(1, device=device)
    triton_reshape_and_cache_flash(*written, keys, values, slots.to(device), "auto", one, one)
    if not torch.equal(keys[slots.to(device) // size, slots.to(device) % size], written[0]):
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

    def run(attend: Callable[..., None]) -> Tensor:
        out = torch.full_like(query, float("nan"))
        attend(query, keys, values, out, **given)
        return out.float()

    close = 1e-4 if dtype == torch.float32 else 3e-2
    return torch.allclose(run(tree_attention.tree_attention), run(tree_attention.reference), rtol=close, atol=close)


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
    written = torch.randn(len(CONTEXTS) * blocks, groups, size, 2 * dim, generator=generator).to(device, dtype)

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
