# SPDX-License-Identifier: Apache-2.0
"""A draft model where the host does not know what was accepted, and does not ask.

Which nodes have come true, where a request's known tokens end and which of them are new stays on the device. The host knows how
many tokens a request can have got at most, and that many rows are run: those that are not there write no K/V, and what stands
behind them is not read.

Where the target's passes are replayed from full CUDA graphs, the draft's are too: those over a tree's level, and those that read
what one step brings. Prompts, and what was missed while nobody asked, are of any length and run without a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.states import RequestState

from vllm_spec_plugins.engine import kv
from vllm_spec_plugins.engine.drafter import NO_SLOT, LoadedDraft, Step
from vllm_spec_plugins.engine.support import MOST_ROWS
from vllm_spec_plugins.engine.tree_rows import TreeRows
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.tree.tree import TokenTree

if TYPE_CHECKING:
    from vllm_spec_plugins.engine.draft_graphs import DraftGraphs
    from vllm_spec_plugins.engine.triton_attention import KernelRows


class DeviceDrafter(LoadedDraft):
    """A draft model on any device but a CPU.

    Args:
        nodes: N, most nodes per tree.
    """

    def __init__(self, vllm_config: VllmConfig, model: str, number: int, req_states: RequestState, nodes: int) -> None:
        super().__init__(vllm_config, model, number, req_states)
        requests, device = req_states.max_num_reqs, req_states.total_len.gpu.device
        # As in Drafter: tokens that have K/V, and the trees that the draft has got, by slot.
        self.seen = torch.zeros(requests, dtype=torch.int64, device=device)
        self.tokens = torch.full((requests, nodes), -1, dtype=torch.int64, device=device)
        self.parents = torch.zeros(requests, nodes, dtype=torch.int64, device=device)
        self.grown_at = torch.full((requests,), -1, dtype=torch.int64, device=device)
        self.levels = 0  # of the deepest tree so far
        self.widths: set[int] = set()  # rows per request that levels had so far: all there are, once trees were grown
        self.graphs: DraftGraphs | None = None
        self.steady = 0  # rows per request of the graphs that read known tokens
        # How many tokens may be known of each request that have no K/V yet, the root included.
        self.most = np.ones(requests, dtype=np.int64)

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().bind(kv_cache_config, block_tables)
        self._commit = kv.PathCommit(self.caches, self.block_size)

    def capture(self, steady: int) -> None:
        from vllm_spec_plugins.engine.draft_graphs import DraftGraphs
        from vllm_spec_plugins.engine.triton_attention import TritonTreeMetadata

        def run(token: Tensor, position: Tensor, rows: KernelRows, slot: Tensor) -> Tensor:
            return self._run(token, position, dict.fromkeys(self.layers, TritonTreeMetadata(rows)), slot)

        self.steady, device = min(steady, MOST_ROWS), self.tokens.device
        self.chain = torch.ones(self.steady, self.steady, dtype=torch.bool, device=device).tril()
        rows, blocks = self.widths | {self.steady}, self.table.shape[1]
        width = max(self.tokens.shape[1] + 1, self.steady)
        self.graphs = DraftGraphs(self.target_config, device, rows, width, blocks, run)
        self.graphs.capture_passes()

    def release(self) -> None:
        self.graphs = None

    def add_request(self, slot: int, computed: int) -> None:
        """A request moves into `slot` with `computed` tokens in the prefix cache, the draft's K/V with them."""
        self.seen[slot], self.grown_at[slot], self.most[slot] = computed, -1, 1

    def stepped(self, slots: np.ndarray, most: np.ndarray) -> None:
        self.most[slots] += most

    def asked(self, slots: np.ndarray) -> None:
        self.batch = slots

    def begin(self, ctx: StepContext) -> Tensor:
        slots, emitted = ctx.slots, ctx.num_emitted > 0
        assert len(slots) == len(self.batch), "the host was told of another batch"
        # A request inside its prompt has no root yet: the draft reads what the target has read.
        ends = self.req_states.num_computed_tokens.gpu[slots].long() + emitted
        seen = self._keep(slots, ends)
        self.slots, self.step = slots, Step(ends - 1, self.table[slots])
        hidden = self._read(seen, ends, ctx.max_length)
        self.seen[slots], self.grown_at[slots] = ends, (ends - 1).where(emitted, -1)
        self.tokens[slots] = -1
        self.most[self.batch] = 1
        return self.model.compute_logits(hidden).float()

    def extend(self, tree: TokenTree, request: Tensor, row: Tensor) -> Tensor:
        nodes = tree.tokens.shape[1]
        self.tokens[self.slots, :nodes], self.parents[self.slots, :nodes] = tree.tokens, tree.parents
        self.levels = max(self.levels, tree.max_depth)
        return super().extend(tree, request, row)

    def _pass(self, token: Tensor, position: Tensor, rows: TreeRows, slot: Tensor) -> Tensor:
        requests = len(rows.prefix)
        self.widths.add(rows.num_tokens // requests)
        graph = self.graphs and self.graphs.find(requests, rows.num_tokens // requests)
        if self.graphs is None or graph is None:
            return super()._pass(token, position, rows, slot)
        return self.graphs.replay(graph, token, position, rows, slot)

    def _keep(self, slots: Tensor, ends: Tensor) -> Tensor:
        """Move the K/V of the nodes that have come true; [B] int64, the tokens that have K/V then, never the new root.

        As `tree.loops.follow`, one level at a time.
        """
        tokens, parents, root, now = self.tokens[slots], self.parents[slots], self.grown_at[slots], self.seen[slots]
        known, at = self.req_states.all_token_ids.gpu, torch.zeros_like(root)
        goes_on, path = (root >= 0) & (root + 1 == now), []
        for _ in range(self.levels):
            token = known[slots, now.clamp(max=self.max_len - 1)]
            right = (tokens == token.unsqueeze(1)) & (parents == at.unsqueeze(1))
            child = right.int().argmax(1) + 1
            goes_on = goes_on & right.any(1) & (now < ends - 1) & (root + child < self.max_len)
            at = child.where(goes_on, at)
            path.append(child.where(goes_on, 0))
            now = now + goes_on
        if path:
            found = torch.stack(path, 1)
            self._commit(self.table, slots, root, found, (found > 0).sum(1))
        return now

    def _read(self, seen: Tensor, ends: Tensor, max_length: int) -> Tensor:
        """Run the known tokens from `seen` to `ends` [B] through the draft: [B, H], the hidden states of each one's last."""
        most = np.minimum(self.most[self.batch], self.max_len)
        graph = self._steady_graph(most)
        if graph is not None:
            most[:] = self.steady
        # Rows begin before `seen` where they would else stand behind the last position that a block table has.
        start = torch.minimum(seen, self.max_len - async_tensor_h2d(most, seen.device))
        longest = min(self.max_len, max_length + int(most.max()))
        done, last = np.zeros_like(most), None
        while (todo := most - done).any():
            room = np.maximum(self.max_tokens - (todo.cumsum() - todo), 0)
            count = np.minimum(todo, room)
            part = np.flatnonzero(count)
            last = self._read_part(part, done[part], count[part], start, seen, ends, longest, last, graph)
            done = done + count
        assert last is not None
        return last

    def _steady_graph(self, most: np.ndarray) -> BatchExecutionDescriptor | None:
        """The graph that reads up to `most` [B] tokens of each request, if no request has more than usual."""
        if self.graphs is None or not most.max() <= self.steady <= self.max_len:
            return None
        return self.graphs.find(len(most), self.steady) if len(most) * self.steady <= self.max_tokens else None

    def _read_part(
        self,
        part: np.ndarray,
        done: np.ndarray,
        count: np.ndarray,
        start: Tensor,
        seen: Tensor,
        ends: Tensor,
        longest: int,
        last: Tensor | None,
        graph: BatchExecutionDescriptor | None,
    ) -> Tensor:
        """`count` rows of requests `part` of the batch, from `done` behind `start`, [P] each; what is the last one's goes to
        `last` [B, H]. With a graph they are all requests' `steady` rows, chains behind what stands before them.
        """
        starts = np.zeros(len(part) + 1, dtype=np.int32)
        np.cumsum(count, out=starts[1:])
        local = np.repeat(np.arange(len(part)), count)
        rows = np.stack((part[local], np.arange(starts[-1]) - starts[local] + done[local]))
        request, offset = async_tensor_h2d(rows, seen.device)
        those, behind, first, number = async_tensor_h2d(np.stack((part, done, starts[:-1], count)), seen.device)

        position = start[request] + offset
        real = (position >= seen[request]) & (position < ends[request])
        token = self.req_states.all_token_ids.gpu[self.slots[request], position].clamp(min=0)
        slot = self._slots(self.step.table, request, position).where(real, NO_SLOT)
        if self.graphs is not None and graph is not None:
            sees = self.chain.repeat(len(part), 1)
            known = TreeRows(len(token), request, start, number, sees, self.step.table, self.block_size)
            hidden = self.graphs.replay(graph, token, position, known, slot)
        else:
            lengths, bounds = (start[those] + behind + number).int(), torch.from_numpy(starts)
            metadata = self._known(bounds, count, lengths, longest, self.step.table[those], slot)
            hidden = self._run(token, position, metadata, slot)

        row = (ends - 1 - start)[those] - behind
        here = ((row >= 0) & (row < number)).unsqueeze(1)
        found = hidden[first + row.clamp(min=0).minimum(number - 1)]
        if last is None:
            last = hidden.new_zeros(len(seen), hidden.shape[1])
        last[those] = found.where(here, last[those])
        return last
