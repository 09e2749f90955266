# SPDX-License-Identifier: Apache-2.0
"""Full CUDA graphs of a draft model's passes.

A pass of a small model is many launches with little to do in each. A pass over as many rows of every request has a shape that the
host knows, so it is captured once per number of rows and of requests, by vLLM's own mechanism. What it is told of a step stands
in buffers that are made once and written in place; a replay reads what they hold then. Requests that pad the batch have no rows:
nothing is written for them, and they attend to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_spec_plugins.engine.drafter import NO_SLOT
from vllm_spec_plugins.engine.tree_rows import TreeRows
from vllm_spec_plugins.engine.triton_attention import KernelRows
from vllm_spec_plugins.tree.tree import as_words

# (tokens [T] int32, their positions [T] int64, the rows that they are, their slots [T] int64) -> hidden states [T, H].
Pass = Callable[[Tensor, Tensor, KernelRows, Tensor], Tensor]


class DraftGraphs(CudaGraphManager):
    """The graphs of one draft model.

    Args:
        rows: how many rows of each request a pass may have.
        width: S, the most tree tokens that a row may see.
        blocks: M, width of the block table.
        run: the pass.

    Attributes:
        token, position, slot: [most rows]; words: [most rows, ceil(S / 64)]; start: [most requests + 1]; prefix, behind: [most
            requests]; table: [most requests, M]: what a graph reads, see `KernelRows`.
        hidden: [most rows, H], what it writes; None before the first pass.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        rows: Iterable[int],
        width: int,
        blocks: int,
        run: Pass,
    ) -> None:
        self._rows, self._run = sorted(rows), run
        self.requests = 0
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, vllm_config.num_speculative_tokens + 1)
        requests, tokens = self.requests, self.requests * max(self._rows, default=0)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token = zeros(tokens, dtype=torch.int32)
        self.position, self.slot = (zeros(tokens, dtype=torch.int64) for _ in range(2))
        self.words = zeros(tokens, -(-width // 64), dtype=torch.int64)
        self.start = zeros(requests + 1, dtype=torch.int32)
        self.prefix, self.behind = (zeros(requests, dtype=torch.int32) for _ in range(2))
        self.table = zeros(requests, blocks, dtype=torch.int32)
        self.hidden: Tensor | None = None
        self._number = torch.arange(requests + 1, dtype=torch.int32, device=device)

    def _init_candidates(self) -> None:
        """A graph for each number of rows and each number of requests that the target has one for."""
        super()._init_candidates()
        counts = {desc.num_reqs or 0 for desc in self._capture_descs.pop(CUDAGraphMode.FULL, ())}
        self.requests = max(counts, default=0)
        descs = [
            BatchExecutionDescriptor(CUDAGraphMode.FULL, count * rows, count, uniform_token_count=rows)
            for rows in self._rows
            for count in counts
        ]
        descs.sort(key=lambda desc: desc.num_tokens)
        most = descs[-1].num_tokens if descs else 0
        self._candidates = {
            (tokens, 0): [desc for desc in descs if desc.num_tokens >= tokens] for tokens in range(1, most + 1)
        }
        if descs:
            self._capture_descs[CUDAGraphMode.FULL] = descs[::-1]  # the largest first, whose memory the others use

    def capture_passes(self) -> None:
        """Run every pass once, and capture it. The draft's K/V caches are bound."""
        self.capture(self._forward_of, "Capturing draft model CUDA graphs")

    def _forward_of(self, desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
        """The pass on the buffers, which say that every row is the root of an empty text and has no slot."""
        requests, rows, tokens = desc.num_reqs, desc.uniform_token_count, desc.num_tokens
        assert requests is not None and rows is not None
        self._bound(requests, requests, rows)
        for buffer, value in ((self.slot, NO_SLOT), (self.words, 1), (self.behind, 1)):
            buffer.fill_(value)
        for buffer in (self.token, self.position, self.prefix, self.table):
            buffer.zero_()
        token, position, slot = self.token[:tokens], self.position[:tokens], self.slot[:tokens]
        given = KernelRows(
            num_tokens=tokens,
            max_rows=rows,
            start=self.start[: requests + 1],
            prefix=self.prefix[:requests],
            behind=self.behind[:requests],
            words=self.words[:tokens],
            table=self.table[:requests],
        )

        def forward(mode: CUDAGraphMode) -> None:
            found = self._run(token, position, given, slot)
            if self.hidden is None:  # before the first capture, the largest
                self.hidden = found.new_empty(len(self.token), found.shape[1])
            self.hidden[:tokens].copy_(found)

        return forward

    def _bound(self, padded: int, requests: int, rows: int) -> None:
        """Of `padded` requests the first `requests` have `rows` rows each, the others none."""
        start = self.start[: padded + 1]
        torch.mul(self._number[: padded + 1], rows, out=start)
        start.clamp_(max=requests * rows)

    def find(self, requests: int, rows: int) -> BatchExecutionDescriptor | None:
        """The smallest graph for `requests` requests of `rows` rows each; None: there is none."""
        desc = self.dispatch(requests, requests * rows, rows, 0)
        return desc if desc.cg_mode == CUDAGraphMode.FULL else None

    def replay(
        self, desc: BatchExecutionDescriptor, token: Tensor, position: Tensor, rows: TreeRows, slot: Tensor
    ) -> Tensor:
        """[R, H] hidden states of R rows, as many of every request and request by request. They stand until the next replay."""
        requests, tokens = len(rows.prefix), rows.num_tokens
        assert desc.num_reqs is not None
        self._bound(desc.num_reqs, requests, tokens // requests)
        self.token[:tokens].copy_(token)
        self.position[:tokens].copy_(position)
        self.slot[:tokens].copy_(slot)
        self.slot[tokens : desc.num_tokens].fill_(NO_SLOT)
        self.prefix[:requests].copy_(rows.prefix)
        self.behind[:requests].copy_(rows.behind)
        words = as_words(rows.sees)
        self.words[:tokens, : words.shape[1]].copy_(words)
        self.words[:tokens, words.shape[1] :].zero_()
        self.table[:requests].copy_(rows.table)
        self.run_fullgraph(desc)
        assert self.hidden is not None
        return self.hidden[:tokens]
