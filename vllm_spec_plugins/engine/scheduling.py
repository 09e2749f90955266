# SPDX-License-Identifier: Apache-2.0
"""The governor in vLLM's scheduler: what it is told of each step, and how its decision takes effect."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_spec_plugins.engine.contrastive import wants
from vllm_spec_plugins.engine.governor import Draft, Governor
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.settings import SpeculationSettings


@dataclass
class TreeDraftTokenIds(DraftTokenIds):
    """vLLM's drafts, as trees.

    Attributes:
        gain: how many nodes each request's proposer expects to be accepted.
        parents: row of each node's parent; None when no request of the batch has a grammar (tokens are -1 then).
        counts: what proposer and rule counted since the last ones (`Method.counts`).
    """

    gain: list[float]
    parents: list[list[int]] | None = None
    counts: list[int] = field(default_factory=list)


def governor_of(scheduler: Any) -> Governor | None:
    """The scheduler's governor. None where nothing can be declined: without speculation, when the user said so, and
    under asynchronous scheduling, which reserves a draft's rows before there is a draft.
    """
    if not hasattr(scheduler, "_spec_governor"):
        settings = settings_of(scheduler.vllm_config)
        wanted = isinstance(settings, SpeculationSettings) and settings.adapt
        waits = not scheduler.vllm_config.scheduler_config.async_scheduling
        scheduler._spec_governor = Governor() if wanted and waits else None
        scheduler._spec_scheduled_at = None
    return scheduler._spec_governor


def scheduled(scheduler: Any, step: SchedulerOutput) -> None:
    """A step is about to run."""
    governor = governor_of(scheduler)
    if governor is not None:
        governor.forget(step.finished_req_ids)
        if not governor.asks(len(scheduler.running)):
            if any(wants(scheduler.requests[request].sampling_params) for request in step.num_scheduled_tokens):
                governor.asked = True  # their candidates travel as drafts: while they run, every step is asked
            else:
                step.num_spec_tokens_to_schedule = 0
        scheduler._spec_scheduled_at = time.perf_counter()


def ran(scheduler: Any, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
    """The step has run, its output is not looked at yet."""
    governor = governor_of(scheduler)
    if governor is None or scheduler._spec_scheduled_at is None:
        return
    seconds = time.perf_counter() - scheduler._spec_scheduled_at
    scheduler._spec_scheduled_at = None
    drafts, counts = step.scheduled_spec_decode_tokens, step.num_scheduled_tokens
    for request in drafts:
        emitted = output.sampled_token_ids[output.req_id_to_index[request]]
        governor.accepted(request, max(len(emitted) - 1, 0))
    nodes = sum(map(len, drafts.values()))
    if counts and sum(counts.values()) == len(counts) + nodes:  # a prompt's tokens would count as rows
        governor.observe(len(counts), nodes, seconds)


def decline(scheduler: Any, drafts: DraftTokenIds) -> None:
    """Empty the drafts that are not worth their time, before the scheduler takes them over."""
    governor = governor_of(scheduler)
    if governor is None or not isinstance(drafts, TreeDraftTokenIds):
        return
    offered, chosen = [], set()
    for request, tokens, gain in zip(drafts.req_ids, drafts.draft_token_ids, drafts.gain, strict=True):
        state = scheduler.requests.get(request)
        if state is None or state.is_prefill_chunk:
            continue
        if wants(state.sampling_params):  # nothing to weigh: without its candidates it gets no token
            chosen.add(request)
        else:
            offered.append(Draft(request, len(tokens), gain))
    if offered or not chosen:
        chosen |= governor.choose(len(scheduler.running), offered)
    drafts.draft_token_ids = [
        tokens if request in chosen else []
        for request, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
    ]
