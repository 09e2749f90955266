# SPDX-License-Identifier: Apache-2.0
"""Token trees and the rules that accept from them. Pure torch: knows neither vLLM nor models."""

from vllm_spec_plugins.tree.accept import (
    Acceptance,
    AcceptRule,
    TargetRows,
    Typical,
    Walk,
    accept_down_to,
    deepest_reachable,
)
from vllm_spec_plugins.tree.builders import append, chain, trie
from vllm_spec_plugins.tree.topology import Topology, chain_topology, from_choices, lookahead_window, widths
from vllm_spec_plugins.tree.tree import TokenTree
from vllm_spec_plugins.tree.union import Forest, union

__all__ = [
    "AcceptRule",
    "Acceptance",
    "Forest",
    "TargetRows",
    "TokenTree",
    "Topology",
    "Typical",
    "Walk",
    "accept_down_to",
    "append",
    "chain",
    "chain_topology",
    "deepest_reachable",
    "from_choices",
    "lookahead_window",
    "trie",
    "union",
    "widths",
]
