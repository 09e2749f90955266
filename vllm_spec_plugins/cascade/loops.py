# SPDX-License-Identifier: Apache-2.0
"""What rules.py and routes.py compute with tensors, as compiled loops. Arrays as the tensors there."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_spec_plugins.compiled import compiled


@compiled
def first_children(tokens: Any, parents: Any) -> Any:
    """[B, N] bool: nodes that stand first below their parent."""
    batch, nodes = tokens.shape
    first = np.zeros((batch, nodes), dtype=np.bool_)
    taken = np.empty(nodes + 1, dtype=np.bool_)
    for b in range(batch):
        taken[:] = False
        for node in range(nodes):
            if tokens[b, node] >= 0 and not taken[parents[b, node]]:
                taken[parents[b, node]] = True
                first[b, node] = True
    return first


@compiled
def refused(tokens: Any, parents: Any, good: Any, drawn: Any) -> Any:
    """[B, N] bool: nodes whose token does not stand behind their parent."""
    batch, nodes = tokens.shape
    wrong = np.ones((batch, nodes), dtype=np.bool_)
    taken, replaced = np.empty(nodes + 1, dtype=np.bool_), np.empty(nodes + 1, dtype=np.bool_)
    for b in range(batch):
        taken[:] = False
        replaced[:] = False
        for node in range(nodes):
            above = parents[b, node]
            if tokens[b, node] < 0:
                continue
            if not taken[above]:
                taken[above] = True
                replaced[above] = good[b, node] and drawn[b, node + 1] >= 0
                wrong[b, node] = not replaced[above]
            if not replaced[above]:
                wrong[b, node] = drawn[b, node + 1] < 0 or tokens[b, node] != drawn[b, above]
    return wrong


@compiled
def compare(tokens: Any, parents: Any, drawn: Any, path: Any, accepted: Any) -> tuple[Any, Any, Any]:
    """[B] each: rows from the root down the accepted path with a child, those whose first child was drawn, and those whose first
    child was accepted though it was not.
    """
    batch, nodes = tokens.shape
    judged, agreed = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
    kept = np.zeros(batch, dtype=np.int64)
    for b in range(batch):
        for step in range(accepted[b] + 1):
            row = path[b, step - 1] if step else 0
            for node in range(nodes):
                if tokens[b, node] >= 0 and parents[b, node] == row:
                    judged[b] += 1
                    same = tokens[b, node] == drawn[b, row]
                    agreed[b] += same
                    kept[b] += not same and step < accepted[b] and path[b, step] == node + 1
                    break
    return judged, agreed, kept
