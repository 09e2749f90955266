# SPDX-License-Identifier: Apache-2.0
"""vLLM's speculation metrics, made true for trees.

vLLM's mean acceptance length is 1 + accepted / drafts, and it counts a step as a draft only when it had draft tokens.
A proposer that proposes nothing when it knows nothing would look better than it is, so every decode step counts: the
mean acceptance length is then the tokens per target step. Draft tokens are tree nodes, positions are depths.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats


def count_steps_without_drafts(num_spec_tokens: int, step: SchedulerOutput, outputs: dict[int, Any]) -> None:
    """Add the decode steps that had no nodes to the step's statistics, as drafts of no token.

    Args:
        num_spec_tokens: N, nodes per tree.
        step: what was scheduled.
        outputs: EngineCoreOutputs by client; one of them carries the statistics, if they are collected at all.
    """
    drafted = step.scheduled_spec_decode_tokens
    plain = sum(1 for request, tokens in step.num_scheduled_tokens.items() if tokens == 1 and request not in drafted)
    carrier = next((output.scheduler_stats for output in outputs.values() if output.scheduler_stats is not None), None)
    if plain == 0 or carrier is None:
        return
    if carrier.spec_decoding_stats is None:
        carrier.spec_decoding_stats = SpecDecodingStats.new(num_spec_tokens)
    carrier.spec_decoding_stats.num_drafts += plain


def by_depth(stats: SpecDecodingStats, max_depth: int) -> list[int]:
    """Accepted tokens by depth: no path is longer than the deepest tree."""
    return stats.num_accepted_tokens_per_pos[:max_depth]
