# SPDX-License-Identifier: Apache-2.0
"""What a captured CUDA graph needs of the Triton backend, shown without a GPU: the work is done by the metadata object that
was made for the capture, after `build` has been told of a later step.

A process of its own, because Triton's interpreter must be on before vllm is imported:

    python -m tests.engine.cpu.replay SEED    # prints one JSON object: what is shown -> whether it holds
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any

from vllm_spec_plugins.cpu import interpreted

if __name__ == "__main__":
    interpreted.enable()

import numpy as np
import torch
from torch import Tensor

import vllm_spec_plugins
from tests.engine.cpu.decode import TARGET

NODES, SIZE, HEADS, GROUPS, DIM, BLOCKS = 5, 16, 4, 2, 32, 88
MOST_REQUESTS, WIDTH, WINDOW = 4, 20, 260  # blocks per request, tokens


class Batch:
    """The buffers that vLLM writes in place, and a K/V cache whose blocks hold what `keys` and `values` say."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.start = torch.zeros(MOST_REQUESTS + 1, dtype=torch.int32)
        self.lengths = torch.zeros(MOST_REQUESTS, dtype=torch.int32)
        self.table = torch.zeros(MOST_REQUESTS, WIDTH, dtype=torch.int32)
        self.slots = torch.zeros(64, dtype=torch.int64)
        self.cache = torch.randn(BLOCKS, GROUPS, SIZE, 2 * DIM, generator=generator)

    def common(self, rows: list[int], contexts: list[int], padded: int) -> Any:
        """The metadata of a step: `rows` query rows behind `contexts` tokens, in a batch of `padded` requests."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        count, total = len(rows), sum(rows)
        self.start[: count + 1] = torch.tensor([0, *np.cumsum(rows)])
        self.start[count + 1 :] = total
        self.lengths.zero_()
        self.lengths[:count] = torch.tensor(rows) + torch.tensor(contexts)
        blocks = 1 + torch.randperm(BLOCKS - 1, generator=self.generator)[: count * WIDTH]
        self.table[:count] = blocks.view(count, WIDTH)
        tokens = padded * (NODES + 1) if padded > count else total
        return CommonAttentionMetadata(
            query_start_loc=self.start[: padded + 1],
            query_start_loc_cpu=self.start[: padded + 1].clone(),
            seq_lens=self.lengths[:padded],
            num_reqs=padded,
            num_actual_tokens=tokens,
            max_query_len=max(rows),
            max_seq_len=int(self.lengths.max()),
            block_table_tensor=self.table[:padded],
            slot_mapping=self.slots[:tokens],
            seq_lens_cpu_upper_bound=self.lengths[:padded].clone(),
        )

    def expected(self, query: Tensor, sees: list[Tensor], window: int) -> Tensor:
        """Dense attention of every row over the tokens before its request's rows, and those of its rows that it sees; of all
        these the last `window`, if it is not 0.
        """
        out = []
        for b, mask in enumerate(sees):
            length = int(self.lengths[b])
            place = torch.arange(length)
            tokens = self.cache[self.table[b, place // SIZE].long(), :, place % SIZE]  # [length, G, 2 * D]
            keys, values = tokens.repeat_interleave(HEADS // GROUPS, 1).split(DIM, -1)
            first = int(self.start[b])
            scores = torch.einsum("rhd,lhd->rhl", query[first : first + len(mask)], keys) * DIM**-0.5
            whole = torch.cat((torch.ones(len(mask), length - len(mask), dtype=torch.bool), mask), 1)
            if window:
                position = length - len(mask) + mask.sum(1) - 1
                whole &= place > (position - window).unsqueeze(1)
            weights = scores.masked_fill(~whole.unsqueeze(1), float("-inf")).softmax(-1)
            out.append(torch.einsum("rhl,lhd->rhd", weights, values))
        return torch.cat(out)


def random_trees(drafts: list[int], rest: list[int], generator: torch.Generator) -> tuple[Any, list[Tensor]]:
    """The trees of requests with `drafts` nodes and one row in each of `rest`, which have none, and who sees whom."""
    from vllm_spec_plugins.engine.state import StepTrees
    from vllm_spec_plugins.tree.tree import TokenTree

    count = len(drafts) + len(rest)
    parents = torch.stack([torch.randint(0, j + 1, (count,), generator=generator) for j in range(NODES)], 1)
    tree = TokenTree(torch.ones(count, NODES, dtype=torch.int64), parents)
    tree = tree.truncate(torch.tensor([*drafts, *[0] * len(rest)]))
    rows = np.array([*(n + 1 for n in drafts), *[1] * len(rest)])
    request = torch.from_numpy(np.repeat(np.arange(count), rows))
    sees = []
    for b, nodes in enumerate(drafts):
        mask = torch.eye(nodes + 1, dtype=torch.bool)
        for j in range(nodes):
            mask[j + 1] |= mask[int(parents[b, j])]
        sees.append(mask)
    sees += [torch.ones(n, n, dtype=torch.bool).tril() for n in rest]
    return StepTrees(tree, rows, len(drafts), request, branched=True), sees


def tensors_of(metadata: Any) -> dict[str, Tensor]:
    found = {field.name: getattr(metadata.tree, field.name) for field in fields(metadata.tree)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def main(seed: int) -> dict[str, bool]:
    shown = replays(seed, 0)
    shown |= {f"with a window: {what}": holds for what, holds in replays(seed, WINDOW).items()}
    return shown | self_checks(torch.device("cpu"))


def replays(seed: int, window: int) -> dict[str, bool]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    given = vllm_spec_plugins.engine_args("lookahead", nodes=NODES)
    config = EngineArgs(model=str(TARGET), dtype="float32", max_num_seqs=MOST_REQUESTS, **given).create_engine_config()
    from vllm_spec_plugins.engine.triton_attention import TritonTreeBuilder, TritonTreeImpl

    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cpu")
    spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=GROUPS, head_size=DIM, dtype=torch.float32)
    impl: Any = TritonTreeImpl(HEADS, DIM, DIM**-0.5, GROUPS, None, window or None, "auto")
    layer: Any = type("Layer", (), {"_k_scale": torch.ones(1), "_v_scale": torch.ones(1), "_q_scale": torch.ones(1)})
    layer.impl = impl
    config.compilation_config.static_forward_context["layer"] = layer
    with set_current_vllm_config(config):
        builder: Any = TritonTreeBuilder(spec, ["layer"], config, device)
    batch, rows = Batch(generator), NODES + 1

    def run(metadata: Any, tokens: int) -> tuple[Tensor, Tensor]:
        query = torch.randn(tokens, HEADS, DIM, generator=generator)
        out = torch.full_like(query, float("nan"))
        impl.forward(layer, query, query, query, batch.cache, metadata, out)
        return query, out

    def equal(found: Tensor, expected: Tensor) -> bool:
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    shown: dict[str, bool] = {}
    captured = builder.build_for_cudagraph_capture(batch.common([rows] * 3, [0] * 3, 3))
    query, out = run(captured, 3 * rows)
    chain = [torch.ones(rows, rows, dtype=torch.bool).tril()] * 3
    shown["a graph is captured with chains"] = equal(out, batch.expected(query, chain, window))
    before = {name: value.data_ptr() for name, value in tensors_of(captured).items()}
    owned = {
        tensor.untyped_storage().data_ptr()
        for tensor in (builder.words, builder.prefix, builder.behind, builder.depth, batch.start, batch.table)
        if tensor is not None
    }
    shown["all it reads of a step stands in buffers that stay"] = owned == {
        value.untyped_storage().data_ptr() for value in tensors_of(captured).values()
    }

    replayed, addresses, padding = [], [], []
    for count in (3, 2, 3, 1):
        contexts = torch.randint(0, WIDTH * SIZE - rows, (count,), generator=generator).tolist()
        common = batch.common([rows] * count, contexts, 3)
        trees, sees = random_trees([NODES] * count, [], generator)
        built = builder.build(0, common, trees=trees)
        addresses.append({name: value.data_ptr() for name, value in tensors_of(built).items()} == before)
        query, out = run(captured, 3 * rows)
        replayed.append(equal(out[: count * rows], batch.expected(query, sees, window)))
        padding.append(bool(out[count * rows :].isnan().all()))
    shown["the captured metadata gives each later step's result"] = all(replayed)
    shown["no buffer moves"] = all(addresses)
    shown["rows that pad the batch are left alone"] = all(padding)

    # The controls: a step that was not built leaves the last one's trees, here chains, and a wrong bit is seen.
    common = batch.common([rows] * 3, [7, 0, WINDOW + 30], 3)
    builder.build_for_cudagraph_capture(common)
    trees, sees = random_trees([NODES] * 3, [], generator)
    while all(torch.equal(mask, chain[0]) for mask in sees):
        trees, sees = random_trees([NODES] * 3, [], generator)
    query, out = run(captured, 3 * rows)
    shown["a step that was not built gives another result"] = not equal(out, batch.expected(query, sees, window))
    builder.build(0, common, trees=trees)
    builder.words[rows - 1, 0] ^= 1 << 0
    query, out = run(captured, 3 * rows)
    shown["a flipped bit gives another result"] = not equal(out, batch.expected(query, sees, window))

    # Without a graph: trees of other sizes, and behind them a prompt and a request that decodes.
    mixed = []
    for drafts, rest in (([5, 2], [1, 7]), ([3], [20]), ([1, 4, 2], [])):
        counts = [n + 1 for n in drafts] + rest
        contexts = torch.randint(0, WIDTH * SIZE - 20, (len(counts),), generator=generator).tolist()
        trees, sees = random_trees(drafts, rest, generator)
        built = builder.build(0, batch.common(counts, contexts, len(counts)), trees=trees)
        query, out = run(built, sum(counts))
        mixed.append(equal(out, batch.expected(query, sees, window)))
    shown["a mixed batch's rows see what they should"] = all(mixed)
    if builder.depth is not None:
        common = batch.common([rows], [WINDOW + 30], 1)
        trees, sees = random_trees([NODES], [], generator)
        built = builder.build(0, common, trees=trees)
        builder.depth.zero_()
        query, out = run(built, rows)
        shown["without depths the result is another"] = not equal(out, batch.expected(query, sees, window))
    return shown


def self_checks(device: torch.device) -> dict[str, bool]:
    """The check at an engine's start passes, and finds each of three kernels that is broken."""
    from vllm_spec_plugins.engine import self_check

    def refused(dtype: torch.dtype, heads_apart: bool, window: int = 0, cache_dtype: str = "auto") -> str:
        try:
            self_check.check(device, SIZE, HEADS, GROUPS, DIM, dtype, heads_apart, window, cache_dtype)
        except RuntimeError as error:
            return str(error)
        return ""

    shown = {}
    types = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float32, "fp8"), (torch.bfloat16, "fp8_e4m3")]
    found = [refused(dtype, apart, 0, cache_dtype) for dtype, cache_dtype in types for apart in (True, False)]
    shown["the start's self-check passes in both layouts and all types"] = not any(found)
    shown["the start's self-check passes with a window"] = not (
        refused(torch.float32, True, WINDOW) or refused(torch.float32, True, WINDOW, "fp8")
    )
    attend, walk = self_check.tree_attention.tree_attention, self_check.tree_walk.tree_walk
    broken: list[tuple[Any, str, Any, str]] = [
        (
            self_check.tree_attention,
            "tree_attention",
            lambda *given, words, **others: attend(*given, words=words | 1 << NODES - 1, **others),
            "tree attention computes",
        ),
        (
            self_check.tree_walk,
            "tree_walk",
            lambda tokens, parents, drawn, depth: walk(tokens, parents * 0, drawn, depth),
            "the walk computes",
        ),
        (self_check.kv_commit, "kv_commit", lambda *given: None, "the move of K/V computes"),
    ]
    scaled: list[tuple[Any, str, Any, str]] = [
        (
            self_check.tree_attention,
            "tree_attention",
            lambda *given, v_scale, **others: attend(*given, v_scale=v_scale * 1.1, **others),
            "tree attention computes",
        ),
        (
            self_check,
            "triton_reshape_and_cache_flash",
            lambda *given: write(*given[:-2], given[-1], given[-2]),
            "tree attention computes",
        ),
    ]
    write = self_check.triton_reshape_and_cache_flash
    for (module, name, replacement, sentence), cache_dtype in (
        *((each, "auto") for each in broken),
        *((each, "fp8") for each in scaled),
    ):
        kernel = getattr(module, name)
        setattr(module, name, replacement)
        shown[f"a broken {name} stops the start ({cache_dtype})"] = sentence in refused(
            torch.float32, True, 0, cache_dtype
        )
        setattr(module, name, kernel)
    return shown


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
