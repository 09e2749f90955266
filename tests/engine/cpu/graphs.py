# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without a GPU, in the interpreted lane: vLLM's own loop captures, and a replay calls what was captured once more.

What was captured is a function that was given views of buffers; at a replay it is given nothing. So what a later step does not
write into those buffers is not seen, as on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.no_sync import Synchronised, device, no_sync, on_device

BUFFERS = ("token", "position", "slot", "words", "start", "prefix", "behind", "table")


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    replays = 0
    captured: Callable[[Any], None]

    def replay(self) -> None:
        from vllm.config.compilation import CUDAGraphMode

        Graph.replays += 1
        self.captured(CUDAGraphMode.NONE)


@contextmanager
def _capturing(graph: Graph, pool: Any, stream: Any) -> Iterator[None]:
    """Stands in for torch.cuda.graph. The function that runs under it is found where vLLM's loop keeps it."""
    frame = sys._getframe(2)
    graph.captured = frame.f_locals["forward_fn"]
    assert frame.f_code.co_name == "capture"
    yield


@contextmanager
def captured(llm: Any, sizes: list[int]) -> Iterator[Any]:
    """The one draft model of engine `llm`, with the graphs that it has where the target's hold batches of `sizes` rows."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils

    config = llm.llm_engine.vllm_config.compilation_config
    speculator = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", _capturing),
        (cudagraph_utils, "graph_capture", lambda device: nullcontext()),
        (current_platform, "get_global_graph_pool", lambda: (0, 1)),
        (config, "cudagraph_capture_sizes", sizes),
        (config, "max_cudagraph_capture_size", max(sizes)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
        speculator.capture()
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
    (drafter,) = speculator.drafters
    try:
        yield drafter
    finally:
        speculator.init_cudagraph_manager(CUDAGraphMode.NONE)


class Level:
    """A random level of random trees of `requests` requests, `rows` rows each; half of a level's rows have no slot."""

    def __init__(self, drafter: Any, requests: int, rows: int, generator: torch.Generator) -> None:
        from vllm_spec_plugins.engine.tree_rows import TreeRows

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        count, size, nodes = requests * rows, drafter.block_size, drafter.tokens.shape[1]
        width = drafter.table.shape[1]  # blocks per request
        self.token, self.position = integers(0, 4096, count), integers(0, 200, count)
        blocks = 1 + torch.randperm(len(drafter.caches[0]) - 1, generator=generator)[: requests * width]
        table, end = blocks.view(requests, width).int(), width * size - rows
        prefix, behind = integers(0, end - nodes - 1, requests), integers(1, nodes + 2, requests)
        sees = integers(0, 2, count, nodes + 1).bool()
        sees[:, 0] = True  # a row that sees nothing has no attention
        request = torch.arange(requests).repeat_interleave(rows)
        self.rows = TreeRows(count, request, prefix, behind, sees, table, size)
        place = end + torch.arange(rows).repeat(requests)  # behind what any row reads, one slot each
        self.slot = drafter._slots(table, request, place).where(integers(0, 2, count).bool(), -1)

    @property
    def given(self) -> tuple[Tensor, Tensor, Any, Tensor]:
        return self.token, self.position, self.rows, self.slot


@torch.inference_mode()
def checks(drafter: Any, seed: int) -> dict[str, bool]:
    """What is shown of a captured draft's passes -> whether it holds."""
    from vllm_spec_plugins.engine.drafter import PagedDraft

    generator, graphs = torch.Generator().manual_seed(seed), drafter.graphs
    widest, most = max(graphs._rows), graphs.requests
    for cache in drafter.caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    start = [cache.clone() for cache in drafter.caches]

    def run(function: Callable[..., Tensor], level: Level) -> list[Tensor]:
        """Hidden states and the caches, from the same caches."""
        for cache, content in zip(drafter.caches, start, strict=True):
            cache.copy_(content)
        return [function(*level.given).clone(), *(cache.clone() for cache in drafter.caches)]

    def eager(*given: Any) -> Tensor:
        return PagedDraft._pass(drafter, *given)

    def same(level: Level) -> bool:
        before = Graph.replays
        expected, found = run(eager, level), run(drafter._pass, level)
        assert Graph.replays == before + 1, "no graph was replayed"
        return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, expected, strict=True))

    shown: dict[str, bool] = {}
    batches = [(requests, rows) for rows in graphs._rows for requests in (most, most - 1, 2, 1)]
    shown["passes captured with one batch are right for others, other trees and fewer requests"] = all(
        same(Level(drafter, requests, rows, generator)) for requests, rows in batches
    )
    for name in BUFFERS:
        same(Level(drafter, most - 1, widest, generator))  # what a buffer holds that is not written
        kept = getattr(graphs, name)
        setattr(graphs, name, kept.clone())
        unwritten = all(same(Level(drafter, most, widest, generator)) for _ in range(3))
        shown[f"a pass is another one when {name} is not written"] = not unwritten
        setattr(graphs, name, kept)
    # What stands in the buffers behind the batch would be read outside of the caches.
    for buffer in (graphs.table, graphs.prefix, graphs.behind):
        buffer.fill_(1 << 24)
    shown["rows that pad the batch read nothing and write nothing"] = same(Level(drafter, most - 1, widest, generator))
    shown["nothing of a replay waits for the device"] = same(Level(drafter, most, widest, generator)) and waits_not(
        graphs, Level(drafter, most, widest, generator)
    )
    before = Graph.replays
    run(drafter._pass, Level(drafter, most + 1, widest, generator))
    shown["a batch that no graph holds runs without one"] = Graph.replays == before
    return shown


def waits_not(graphs: Any, level: Level) -> bool:
    """All of a replay but the graph, on tensors in disguise, which raise where the host would wait for a GPU."""
    own = {name: getattr(graphs, name) for name in (*BUFFERS, "hidden", "_number")}
    requests = len(level.rows.prefix)
    desc = graphs.find(requests, level.rows.num_tokens // requests)
    try:
        for name, buffer in own.items():
            setattr(graphs, name, on_device(buffer))
        graphs.run_fullgraph = lambda desc: None
        with device(), no_sync():
            graphs.replay(desc, *on_device(level.given))
        return True
    except Synchronised:
        return False
    finally:
        for name, buffer in own.items():
            setattr(graphs, name, buffer)
        del graphs.run_fullgraph
