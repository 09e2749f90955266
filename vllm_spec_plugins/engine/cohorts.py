# SPDX-License-Identifier: Apache-2.0
"""The scheduler that admits requests in cohorts (layers/cohorts.py). `class_for` says when it is vLLM's scheduler class.

What holds is vLLM's own pause: with PAUSED_NEW, running requests go on (chunked prompts and their preemption included), waiting
ones that hold K/V blocks resume, and the queue stays as it is. Here it lasts one step at a time.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_spec_plugins.config import Settings
from vllm_spec_plugins.depth_settings import SkipDecodeSettings
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.layers.cohorts import Cohorts

logger = init_logger(f"vllm.{__name__}")


def class_for(settings: Settings, config: Any) -> str | None:
    """Full name of the scheduler class for an engine; None: vLLM's own. To ask when `config` is made: until then it is not
    known whether scheduling is asynchronous.
    """
    if not isinstance(settings, SkipDecodeSettings) or not settings.cohort_wait:
        return None
    cls = AsyncCohortScheduler if config.scheduler_config.async_scheduling else CohortScheduler
    return f"{cls.__module__}.{cls.__qualname__}"


class CohortScheduler(Scheduler):
    """For synchronous scheduling.

    Attributes:
        cohorts: the rule.
        held: request id -> steps that it has been held so far, of those that wait.
    """

    prefill_capacity_bound: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = settings_of(self.vllm_config)
        assert isinstance(settings, SkipDecodeSettings)
        num_layers = self.vllm_config.model_config.get_total_num_hidden_layers()
        self.cohorts = Cohorts(settings.schedule(num_layers), settings.cohort_wait)
        self.held: dict[str, int] = {}
        self._count = self._longest = 0  # since the last report

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's step, with the queue of waiting requests closed while they are held."""
        if not self._holds():
            step = super().schedule(throttle_prefills)
            if self.held:
                waiting = {request.request_id for request in self.waiting}
                self.held = {request: steps for request, steps in self.held.items() if request in waiting}
            if self._count and not self.requests:
                self._report()
            return step
        bound = self.prefill_capacity_bound
        self._pause_state = PauseState.PAUSED_NEW
        try:
            step = super().schedule(throttle_prefills)
        finally:
            self._pause_state = PauseState.UNPAUSED
        self.prefill_capacity_bound = bound  # a queue that is held says nothing about capacity
        return step

    def _holds(self) -> bool:
        """Decide for this step, and count it for those who are held."""
        taken = len(self.running) + self.num_waiting_for_streaming_input
        if not self.waiting or self._pause_state != PauseState.UNPAUSED or taken >= self.max_num_active_reqs:
            return False
        running = [request.num_computed_tokens - request.num_prompt_tokens for request in self.running]
        waiting = list(self.waiting)
        held = [self.held.get(request.request_id, 0) for request in waiting]
        if self.cohorts.opens(running, [request.num_output_tokens for request in waiting], held):
            return False
        self.held = {request.request_id: steps + 1 for request, steps in zip(waiting, held, strict=True)}
        self._count += held.count(0)
        self._longest = max(self._longest, max(held) + 1)
        return True

    def _report(self) -> None:
        """When the last request has gone: what was held, and that the bound was kept."""
        what = "Cohorts: %d requests were held, the longest %d of at most %d steps"
        logger.info(what, self._count, self._longest, self.cohorts.wait)
        self._count = self._longest = 0


class AsyncCohortScheduler(CohortScheduler, AsyncScheduler):
    """For asynchronous scheduling."""
