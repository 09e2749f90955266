# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch are tree rows and what they see; shared by the attention backends of all devices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_spec_plugins.engine.state import StepTrees


@dataclass(eq=False)
class TreeRows:
    """Which rows of the batch are tree rows, and what they see. T requests, S tree tokens at most, K/V blocks of size P.

    Attributes:
        num_tokens: R, query rows of the T requests; they stand first in the batch, request by request.
        request: [R] int64, the request of each row.
        prefix: [T] int64, tokens before the root: all rows of the request see them.
        behind: [T] int64, tokens of the tree that stand in the cache behind the prefix, the root first.
        sees: [R, S] bool, which of those a row sees.
        table: [T, M] int32, the requests' K/V blocks.
        block_size: P.
    """

    num_tokens: int
    request: Tensor
    prefix: Tensor
    behind: Tensor
    sees: Tensor
    table: Tensor
    block_size: int
    _dense: dict[int, DenseRows] = field(default_factory=dict, init=False)

    @cached_property
    def depth(self) -> Tensor:
        """[R] int64, depth of each row in its tree: it sees all of its ancestors, and itself."""
        return self.sees.sum(1) - 1

    def dense(self, window: int = 0) -> DenseRows:
        """The same for batched torch operations; of the prefix, rows see what lies in their `window` (0: all)."""
        if window not in self._dense:
            self._dense[window] = self._padded(window)
        return self._dense[window]

    def _padded(self, window: int) -> DenseRows:
        counts = self.request.bincount(minlength=len(self.prefix))  # [T]
        most = int(counts.max())
        starts = counts.cumsum(0) - counts
        place = torch.arange(most)
        real = place < counts.unsqueeze(1)
        row = torch.where(real, starts.unsqueeze(1) + place, starts.unsqueeze(1).clamp(max=self.num_tokens - 1))

        length = self.prefix + self.behind
        # The block of the first token that a root sees; deeper rows see no earlier ones.
        begin = (self.prefix - window + 1).clamp(min=0) // self.block_size if window else torch.zeros_like(length)
        num_blocks = max(1, int((-(-length // self.block_size) - begin).max()))
        block = begin.unsqueeze(1) + torch.arange(num_blocks)  # [T, M]
        # Blocks behind a shorter request may not exist: read block 0 (vLLM's null block) under the mask.
        table = self.table.gather(1, block.clamp(max=self.table.shape[1] - 1)).long()
        table = table.masked_fill(block * self.block_size >= length.unsqueeze(1), 0)
        start = begin * self.block_size
        position = start.unsqueeze(1) + torch.arange(num_blocks * self.block_size)  # [T, M * P]
        sees = (position < self.prefix.unsqueeze(1))[self.request]
        if window:
            first = self.prefix[self.request] + self.depth - window + 1
            sees &= position[self.request] >= first.unsqueeze(1)
        column = (self.prefix - start).unsqueeze(1) + torch.arange(self.sees.shape[1])
        within = column < (length - start).unsqueeze(1)
        column = column.clamp(max=position.shape[1] - 1)[self.request]
        sees = sees.scatter_reduce(1, column, self.sees & within[self.request], "amax")
        bias = torch.full(sees.shape, float("-inf")).masked_fill_(sees, 0.0)[row]  # [T, S, M * P]
        bias = bias.view(len(self.prefix), most, num_blocks, 1, self.block_size).transpose(1, 3)
        return DenseRows(row, real.view(-1).nonzero().squeeze(1), bias.transpose(1, 2), _consecutive(table.reshape(-1)))


@dataclass(eq=False)
class DenseRows:
    """TreeRows, padded to the same number of rows for each of the T requests.

    Attributes:
        row: [T, S] int64, query row of each tree row; rows that do not exist point at the request's first.
        exists: [R] int64, index into the flattened [T, S] of each query row.
        bias: [T, M, 1, S, P] float32, 0 where a row sees a token, else -inf.
        blocks: [T * M] int64, K/V blocks, row-major; a slice when they are consecutive (no copy).
    """

    row: Tensor
    exists: Tensor
    bias: Tensor
    blocks: Tensor | slice


class TreeStep(ModelSpecificAttnMetadata):
    """Carries one step's trees to the metadata builders."""

    def __init__(self, trees: StepTrees) -> None:
        self.trees = trees

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"trees": self.trees}


def tree_rows(trees: StepTrees, common: CommonAttentionMetadata, block_size: int) -> TreeRows:
    """The tree part of a step's metadata. Host-side arithmetic on the CPU; nothing here runs on a GPU."""
    count = trees.num_trees
    rows = torch.from_numpy(trees.num_rows[:count])
    starts = common.query_start_loc[:count].long()
    num_tokens = int(common.query_start_loc[count])
    if num_tokens != int(rows.sum()):
        raise RuntimeError(
            f"{num_tokens} query rows for trees of {int(rows.sum())} rows: a request with drafts holds others"
        )
    request = trees.request[:num_tokens]
    local = torch.arange(num_tokens) - starts[request]
    return TreeRows(
        num_tokens=num_tokens,
        request=request,
        prefix=common.seq_lens[:count].long() - rows,
        behind=rows,
        sees=trees.tree.ancestors()[request, local],
        table=common.block_table_tensor[:count],
        block_size=block_size,
    )


def without_trees(common: CommonAttentionMetadata, count: int, num_tokens: int) -> CommonAttentionMetadata | None:
    """The batch behind its first `count` requests, which have `num_tokens` rows, or None when nothing is left. What is asked
    about lengths is answered by vLLM's copies on the host.
    """
    if common.num_reqs == count:
        return None
    starts = common.query_start_loc_cpu[count:] - num_tokens
    lengths = starts.diff()
    longest = common.seq_lens_cpu_upper_bound
    assert longest is not None
    on_host = common.query_start_loc.device.type == "cpu"
    return replace(
        common,
        query_start_loc=starts if on_host else common.query_start_loc[count:] - num_tokens,
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[count:],
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - num_tokens,
        max_query_len=int(lengths.max()),
        max_seq_len=int(longest[count:].max()),
        block_table_tensor=common.block_table_tensor[count:],
    )


def _consecutive(blocks: Tensor) -> Tensor | slice:
    """A slice when the block numbers count up by one (a request alone on the machine, mostly): a view, not a copy."""
    first = int(blocks[0])
    if bool((blocks == torch.arange(first, first + len(blocks))).all()):
        return slice(first, first + len(blocks))
    return blocks


def foreign(layer: Any) -> RuntimeError:
    """An attention layer does not run tree attention."""
    return RuntimeError(
        f"--plugin: layer {layer.layer_name} runs {type(layer.impl).__name__}, not tree attention: another package replaced "
        f"the attention backend, or an engine was built in this process before the plugin was loaded"
    )


def unknown(layer: Any) -> RuntimeError:
    """An attention layer sees what tree attention does not."""
    return RuntimeError(
        f"--plugin: layer {layer.layer_name} attends with sinks, ALiBi or to an encoder, which tree attention does not know: "
        f"serve the model without --plugin"
    )
