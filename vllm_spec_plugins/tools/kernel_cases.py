# SPDX-License-Identifier: Apache-2.0
"""What `bench kernels` runs: each kernel on the shapes of serving, with what its result is checked against and timed beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_spec_plugins import choices
from vllm_spec_plugins.tree.topology import Topology, from_choices

# One layer of a model of 7 to 8 B parameters: query heads, K/V heads, head size; and how vLLM pages its K/V.
HEADS, GROUPS, DIM, PAGE = 32, 8, 128, 16
LAYERS, VOCABULARY = 32, 128_256

CONTEXTS, BATCHES = (1024, 4096, 16384, 65536), (1, 8, 32, 64)

# 63 nodes and the root: 64 rows.
TREE = from_choices(choices.read("mc_sim_7b_63"))

SEED = 20

# A kernel's plain torch version, and what is asked of the kernels whose launch costs more than their bytes.
REFERENCE = "the reference"
NOT_SLOWER = f"time to {REFERENCE} <= 1"


class Mismatch(Exception):
    """A kernel's result is not its reference's; the message says where and by how much."""


@dataclass(frozen=True)
class Case:
    """A kernel on one shape, its inputs made.

    Attributes:
        launch: the kernel, as the engine calls it; outputs are there already.
        check: launches it and raises Mismatch where its result is not the reference's.
        traffic: bytes that it must move at least; None = the launch costs more than they do.
        beside: what it is timed beside, by name.
    """

    kernel: str
    launch: Callable[[], object]
    check: Callable[[], None]
    traffic: int | None = None
    beside: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """A case to be made on a device.

    Attributes:
        bytes: what its tensors take, about.
        bound: what is asked of it, such as "share of the copy >= 0.8" (`Figure.achieved` has the names); "" = nothing.
    """

    shape: str
    bytes: int
    make: Callable[[str], Case]
    bound: str = ""


def equal(what: str, mine: Tensor, expected: Tensor) -> None:
    """Raises Mismatch unless integers are equal and floats close: 2e-2 in bfloat16 and float16, 1e-5 in float32."""
    if mine.shape != expected.shape:
        raise Mismatch(f"{what} has shape {list(mine.shape)}, not {list(expected.shape)}")
    if mine.dtype.is_floating_point:
        tolerance = 1e-5 if mine.dtype in (torch.float32, torch.float64) else 2e-2
        mine, expected = mine.double(), expected.double()
        wrong = ~torch.isclose(mine, expected, rtol=tolerance, atol=tolerance)
    else:
        wrong = mine != expected
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise Mismatch(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ, first at {at}: "
            f"{mine[tuple(at)].item():g} instead of {expected[tuple(at)].item():g}"
        )


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def paged_cache(blocks: int, groups: int, page: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """[blocks, G, P, 2 * D] with the heads of a token side by side in memory, as vLLM lays keys and values by default."""
    memory = torch.empty(blocks, page, groups, 2 * dim, dtype=dtype, device=device)
    return memory.normal_(generator=generator(device)).transpose(1, 2)


def block_table(batch: int, length: int, page: int, device: str) -> Tensor:
    """[B, M] int32: each request's blocks, scattered over the whole cache of B * M blocks."""
    blocks = -(-length // page)
    order = torch.randperm(batch * blocks, generator=generator(device), device=device)
    return order.view(batch, blocks).to(torch.int32)


def first_nodes(rows: int) -> Topology:
    """The first rows - 1 nodes of TREE; they are a tree."""
    return Topology(TREE.parents[: rows - 1], TREE.ranks[: rows - 1])


def tree_attention(
    device: str,
    *,
    batch: int,
    context: int,
    rows: int = TREE.num_nodes + 1,
    heads: int = HEADS,
    groups: int = GROUPS,
    dim: int = DIM,
    page: int = PAGE,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Trees of `rows` rows behind `context` tokens; beside vLLM's attention of a chain as long, and of one token."""
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from vllm_spec_plugins.kernels import tree_attention as kernel

    table = block_table(batch, context + rows, page, device)
    cache = paged_cache(table.numel(), groups, page, dim, dtype, device)
    key, value = cache.transpose(1, 2).split(dim, -1)
    query = torch.randn(batch * rows, heads, dim, generator=generator(device), device=device).to(dtype)
    out, vllm_out = torch.empty_like(query), torch.empty_like(query)
    words = first_nodes(rows).tree(torch.zeros(1, rows - 1, dtype=torch.int64, device=device)).ancestor_words()
    ints = partial(torch.full, (batch,), dtype=torch.int32, device=device)
    start = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=device)
    given: dict[str, Any] = {
        "start": start,
        "prefix": ints(context),
        "behind": ints(rows),
        "words": words.repeat(batch, 1, 1).flatten(0, 1),
    }
    given |= {"block_table": table, "max_rows": rows, "scale": dim**-0.5}
    launch = partial(kernel.tree_attention, query, key, value, out, **given)

    def check() -> None:
        """The first and the last request; the reference takes a request at a time, and much memory."""
        launch()
        for request in {0, batch - 1}:
            mine = slice(request * rows, (request + 1) * rows)
            alone = {name: each[request : request + 1] for name, each in given.items() if name in _PER_REQUEST}
            rest = {**given, **alone, "start": start[:2], "words": given["words"][mine]}
            expected = torch.empty_like(out[mine])
            kernel.reference(query[mine], key, value, expected, **rest)
            equal(f"request {request}", out[mine], expected)

    # As vLLM's backend has it (its builder): parts of the context side by side for small batches of single tokens.
    most, segments = MIN_LAUNCH_GRID_SIZE_2D // groups, NUM_PAR_SOFTMAX_SEGMENTS
    padded = 1 << (dim - 1).bit_length()
    scratch = torch.empty(most, heads, segments, padded, device=device)
    peaks, sums = (torch.empty(most, heads, segments, device=device) for _ in range(2))

    def vllm(tokens: int) -> Callable[[], object]:
        return partial(
            unified_attention,
            query[: batch * tokens],
            key,
            value,
            vllm_out[: batch * tokens],
            torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device),
            tokens,
            ints(context + tokens),
            context + tokens,
            dim**-0.5,
            True,
            (-1, -1),
            table,
            0,
            None,
            None,
            None,
            seq_threshold_3D=most,
            num_par_softmax_segments=segments,
            softmax_segm_output=scratch,
            softmax_segm_max=peaks,
            softmax_segm_expsum=sums,
        )

    beside = {"vLLM's of a chain as long": vllm(rows), "vLLM's of one token": vllm(1)}
    traffic = attention_bytes(batch, context, rows, heads, groups, dim, dtype)
    return Case("tree_attention", launch, check, traffic, beside)


_PER_REQUEST = ("prefix", "behind", "block_table")


def attention_bytes(batch: int, context: int, rows: int, heads: int, groups: int, dim: int, dtype: torch.dtype) -> int:
    """Keys and values once per request and K/V head, queries in, outputs out."""
    return batch * 2 * dtype.itemsize * dim * ((context + rows) * groups + rows * heads)


def _attention_setups() -> list[Setup]:
    setups = []
    for context in CONTEXTS:
        for batch in BATCHES:
            bound = "share of the copy >= 0.8" if context >= 4096 and batch >= 8 else ""
            # The cache, and for the check one request's scores and its keys and values per query head, in float32.
            size = 4 * batch * (context + 64) * GROUPS * DIM + 4 * context * HEADS * (3 * 64 + 4 * DIM)
            make = partial(tree_attention, batch=batch, context=context)
            setups.append(Setup(f"batch {batch:2}, context {context // 1024:2}k", size, make, bound))
    return setups


def tree_walk(device: str, *, batch: int, topology: Topology = TREE) -> Case:
    """Draws that follow the tree one time in two."""
    from vllm_spec_plugins.kernels import tree_walk as kernel

    rng, nodes = generator(device), topology.num_nodes
    tokens = torch.randint(2, (batch, nodes), generator=rng, device=device)
    drawn = torch.randint(2, (batch, nodes + 1), generator=rng, device=device)
    parents = topology.tree(tokens).parents.contiguous()
    out = kernel.tree_walk(tokens, parents, drawn, topology.max_depth)

    def check() -> None:
        for each in out:
            each.random_(generator=rng)
        launch()
        expected = kernel.tree_walk_reference(tokens, parents, drawn, topology.max_depth)
        for name, mine, right in zip(("path", "num_accepted", "emitted", "num_emitted"), out, expected, strict=True):
            equal(name, mine, right)

    launch = partial(kernel.tree_walk, tokens, parents, drawn, topology.max_depth, out=out)
    return Case(
        "tree_walk",
        launch,
        check,
        beside={REFERENCE: lambda: kernel.tree_walk_reference(tokens, parents, drawn, topology.max_depth)},
    )


CASES: dict[str, list[Setup]] = {
    "tree_attention": _attention_setups(),
    "tree_walk": [
        Setup(f"batch {batch:2}, {TREE.num_nodes} nodes", 0, partial(tree_walk, batch=batch), NOT_SLOWER)
        for batch in (1, 64)
    ],
}
