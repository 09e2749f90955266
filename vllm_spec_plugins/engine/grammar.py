# SPDX-License-Identifier: Apache-2.0
"""Grammars along the paths of trees, in the scheduler's process.

vLLM takes a grammar through a request's drafts in row order, which is right for chains. Here it is taken depth first,
forward along an edge and back: every row is masked by the grammar as its own path leaves it. Nothing is repacked: a node
that the grammar forbids keeps its row, and the mask of its parent's row sees to it that no walk comes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_spec_plugins.engine.scheduling import TreeDraftTokenIds


class GrammarPaths:
    """One request's grammar on the paths of its tree.

    Args:
        tokens: the tree's nodes, padded with -1; the request holds their parents.
    """

    def __init__(self, manager: StructuredOutputManager, request: Any, tokens: Sequence[int]) -> None:
        self.manager, self.request = manager, request
        self.grammar = request.structured_output_request.grammar
        self.tokens = strip_speculative_padding(list(tokens))
        self.children: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]  # of each row
        for node in range(len(self.tokens)):
            self.children[request._spec_parents[node]].append(node + 1)

    def descend(self, allows: Callable[[int, int], bool], arrive: Callable[[int, bool], None]) -> None:
        """Visit every row whose path the grammar allows, depth first; the grammar ends where it began.

        Args:
            allows: (row, token) -> whether `token` may follow `row`; asked while the grammar stands at that row.
            arrive: (row, constrained), called when the grammar stands at the row; not constrained: still reasoning.
        """
        self._descend(0, [], self._start([]) is not None, allows, arrive)

    def _descend(
        self,
        row: int,
        path: list[int],
        constrained: bool,
        allows: Callable[[int, int], bool],
        arrive: Callable[[int, bool], None],
    ) -> None:
        arrive(row, constrained)
        for child in self.children[row]:
            token = self.tokens[child - 1]
            if constrained and not allows(row, token):
                continue
            below = [*path, token]
            start = len(path) if constrained else self._start(below)
            # A grammar that has ended stays there: what follows is free, as in plain decoding.
            fed = [] if start is None or self.grammar.is_terminated() else below[start:]
            if not constrained and self.grammar.validate_tokens(fed) != fed:
                continue  # what ends the reasoning is the answer's first token, and wrong
            if fed and not self.grammar.accept_tokens(self.request.request_id, fed):
                continue
            self._descend(child, below, start is not None, allows, arrive)
            if fed:
                self.grammar.rollback(len(fed))

    def _start(self, path: list[int]) -> int | None:
        """Index of the first token of `path` that the grammar takes; None: the request is still reasoning behind it."""
        grammar_start, constraint_start = self.manager._get_constraint_bounds(self.request, path)
        return grammar_start if constraint_start <= len(path) else None


def remember_parents(scheduler: Any, drafts: DraftTokenIds) -> None:
    """Keep the parents of the trees of requests with a grammar until these are scheduled."""
    if isinstance(drafts, TreeDraftTokenIds) and drafts.parents is not None:
        for request_id, parents in zip(drafts.req_ids, drafts.parents, strict=True):
            request = scheduler.requests.get(request_id)
            if request is not None and request.use_structured_output:
                request._spec_parents = parents


def without_invalid_end(manager: StructuredOutputManager, request: Any, tokens: list[int]) -> list[int]:
    """`tokens` up to the last node that the grammar allows; those in between that it forbids stay."""
    paths = GrammarPaths(manager, request, tokens)
    last = 0

    def allows(row: int, token: int) -> bool:
        return bool(paths.grammar.validate_tokens([token]))

    def arrive(row: int, constrained: bool) -> None:
        nonlocal last
        last = max(last, row)

    if paths.tokens:
        paths.descend(allows, arrive)
    return paths.tokens[:last]


def bitmask(
    manager: StructuredOutputManager,
    requests: Mapping[str, Any],
    request_ids: Sequence[str],
    drafts: Mapping[str, list[int]],
) -> np.ndarray:
    """A line of bits per row of the requests in `request_ids`: [sum of 1 + scheduled nodes, ceil(V / 32)] int32.

    Rows that no path of the grammar leads to are open.
    """
    if manager._grammar_bitmask is None:
        assert manager.backend is not None
        rows = manager.vllm_config.scheduler_config.max_num_seqs * (1 + manager.vllm_config.num_speculative_tokens)
        manager._grammar_bitmask = manager.backend.allocate_token_bitmask(rows)
    masks = manager._grammar_bitmask.numpy()
    first = 0
    for request_id in request_ids:
        tokens = drafts.get(request_id, [])
        _fill(GrammarPaths(manager, requests[request_id], tokens), first, masks[first : first + len(tokens) + 1])
        first += len(tokens) + 1
    return masks[:first]


def _fill(paths: GrammarPaths, first: int, masks: np.ndarray) -> None:
    masks[1:] = -1

    def allows(row: int, token: int) -> bool:
        return token < masks.shape[1] * 32 and bool(masks[row, token // 32] >> (token % 32) & 1)

    def arrive(row: int, constrained: bool) -> None:
        paths.manager._fill_bitmasks([(paths.grammar, first + row, constrained)])

    paths.descend(allows, arrive)
