# SPDX-License-Identifier: Apache-2.0
"""vLLM's speculation metrics, made true for trees.

vLLM's mean acceptance length is 1 + accepted / drafts, and it counts a step as a draft only when it had draft tokens.
A proposer that proposes nothing when it knows nothing would look better than it is, so every decode step counts: the
mean acceptance length is then the tokens per target step. Draft tokens are tree nodes, positions are depths.

What a proposer or a rule counts beside that (`Method.counts`) comes with the drafts and goes on in the statistics' list of
draft tokens per position, behind its N entries: a field of its own would not reach the process that has the metrics, and
vLLM reads no part of that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import prometheus_client
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_spec_plugins.proposers.base import Count


def count_steps_without_drafts(num_spec_tokens: int, step: SchedulerOutput, outputs: dict[int, Any]) -> None:
    """Add the decode steps that had no nodes to the step's statistics, as drafts of no token.

    Args:
        num_spec_tokens: N, nodes per tree.
        step: what was scheduled.
        outputs: EngineCoreOutputs by client; one of them carries the statistics, if they are collected at all.
    """
    drafted = step.scheduled_spec_decode_tokens
    plain = sum(1 for request, tokens in step.num_scheduled_tokens.items() if tokens == 1 and request not in drafted)
    if plain and (stats := _stats_in(outputs, num_spec_tokens)) is not None:
        stats.num_drafts += plain


def _stats_in(outputs: dict[int, Any], num_spec_tokens: int) -> SpecDecodingStats | None:
    """The step's statistics, made if there are none yet; None where none are collected."""
    carrier = next((output.scheduler_stats for output in outputs.values() if output.scheduler_stats is not None), None)
    if carrier is None:
        return None
    if carrier.spec_decoding_stats is None:
        carrier.spec_decoding_stats = SpecDecodingStats.new(num_spec_tokens)
    return carrier.spec_decoding_stats


def keep_counts(scheduler: Any, drafts: Any) -> None:
    """Drafts have come to the scheduler: what was counted with them waits for the next step's statistics."""
    counts = getattr(drafts, "counts", None)
    if counts:
        waiting = getattr(scheduler, "_spec_counts", None) or [0] * len(counts)
        scheduler._spec_counts = [a + b for a, b in zip(waiting, counts, strict=True)]


def send_counts(scheduler: Any, outputs: dict[int, Any]) -> None:
    """Put what waits into the step's statistics."""
    waiting = getattr(scheduler, "_spec_counts", None)
    if waiting and (stats := _stats_in(outputs, scheduler.num_spec_tokens)) is not None:
        stats.num_draft_tokens_per_pos = stats.num_draft_tokens_per_pos[: scheduler.num_spec_tokens] + waiting
        scheduler._spec_counts = None


def counted(stats: SpecDecodingStats) -> list[int]:
    """What `send_counts` put there; [] if nothing."""
    return stats.num_draft_tokens_per_pos[stats.num_spec_tokens :]


class CountsLog:
    """Sums between two log lines."""

    def __init__(self, counts: Sequence[Count]) -> None:
        self.counts, self.sums = counts, [0] * len(counts)

    def observe(self, stats: SpecDecodingStats) -> None:
        if found := counted(stats):
            self.sums = [a + b for a, b in zip(self.sums, found, strict=True)]

    def log(self) -> None:
        """One line, if anything was counted; then from zero again."""
        if any(self.sums):
            init_logger(f"vllm.{__name__}").info("Plugin metrics: %s", self.line())
        self.sums = [0] * len(self.counts)

    def line(self) -> str:
        value = dict(zip((count.name for count in self.counts), self.sums, strict=True))
        parts = []
        for count in self.counts:
            ratio = f" ({value[count.name] / value[count.per]:.2f} per {count.per})" if value.get(count.per) else ""
            parts.append(f"{count.name}: {value[count.name]}{ratio}")
        return ", ".join(parts)


def counters(
    counts: Sequence[Count], labels: list[str], values: dict[int, list[object]]
) -> list[dict[int, prometheus_client.Counter]]:
    """A Prometheus counter per count, by engine."""
    made = (prometheus_client.Counter(f"vllm:spec_plugin_{c.name}", c.doc, labels) for c in counts)
    return [create_metric_per_engine(counter, values) for counter in made]


def by_depth(stats: SpecDecodingStats, max_depth: int) -> list[int]:
    """Accepted tokens by depth: no path is longer than the deepest tree."""
    return stats.num_accepted_tokens_per_pos[:max_depth]
