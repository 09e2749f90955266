# SPDX-License-Identifier: Apache-2.0
"""One exchange between scheduler and workers per step, where vLLM's synchronous scheduler makes two or three.

vLLM asks for the forward pass, then for the sampled tokens (apart, so that a grammar's bitmask is made meanwhile), then
for the drafts. Between two questions the workers stand still: 9% of a tiny model's step on two cores, for the last alone.
Here the answer to the first question holds all three, unless a request of the step has a grammar.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_spec_plugins.engine.settings import settings_of

_DRAFTS = "tree_drafts"


def samples_at_once(worker: Any, step: SchedulerOutput) -> bool:
    """Whether the worker knows all it needs to sample when the forward pass of `step` is done."""
    if not hasattr(worker, "_spec_samples_at_once"):
        config = worker.vllm_config
        # Asynchronous scheduling has asked for the tokens already; with several pipeline stages or K/V connectors the
        # ranks have other things to say after the forward pass.
        worker._spec_samples_at_once = (
            settings_of(config) is not None
            and not config.scheduler_config.async_scheduling
            and config.parallel_config.pipeline_parallel_size == 1
            and config.kv_transfer_config is None
            and config.ec_transfer_config is None
        )
    return worker._spec_samples_at_once and not step.has_structured_output_requests


def enclose(output: Any, runner: Any) -> None:
    """Put the drafts that `runner` has made into its (possibly unfinished) output."""
    inner = getattr(output, "model_runner_output", None)
    if inner is not None and runner.speculator is not None:
        setattr(inner, _DRAFTS, runner.take_draft_token_ids())


def keep(scheduler: Any, output: ModelRunnerOutput) -> None:
    """The output has come: its drafts wait for the end of the step."""
    scheduler._spec_drafts = getattr(output, _DRAFTS, None)


def kept(scheduler: Any) -> DraftTokenIds | None:
    """The drafts that came with the step's output, once. None: they have to be asked for."""
    drafts: DraftTokenIds | None = getattr(scheduler, "_spec_drafts", None)
    scheduler._spec_drafts = None
    return drafts
