# SPDX-License-Identifier: Apache-2.0
"""The cohort scheduler alone, without a model: tokens are made up, queues and blocks are vLLM's."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.engine.conftest import TARGET
from vllm_spec_plugins import CONFIG_KEY
from vllm_spec_plugins.config import SettingError

WAIT = 20
SETTINGS = {"name": "skipdecode", "max_layers": 4, "min_layers": 2, "max_tokens": 32, "levels": 2}


class Steps:
    """A scheduler whose steps are answered with made-up tokens; asynchronous ones one step late.

    `entered` has the step in which each request was scheduled first, `ended` that of its last token, `prompts` the steps in
    which a prompt was read.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.number = 0
        self.entered: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.prompts: set[int] = set()
        self.preempted: list[str] = []
        self._unanswered: deque[Any] = deque()
        self._late = scheduler.scheduler_config.async_scheduling

    def add(self, name: str, prompt: int = 8, tokens: int = 40, priority: int = 0) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        ids = [random.randrange(100) for _ in range(prompt)]
        self.scheduler.add_request(
            Request(name, ids, params, None, priority=priority, arrival_time=float(len(self.scheduler.requests)))
        )

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> list[str]:
        """Run one; returns the requests in it."""
        step = self.scheduler.schedule()
        for name in step.num_scheduled_tokens:
            self.entered.setdefault(name, self.number)
            request = self.scheduler.requests[name]
            if request.num_computed_tokens - step.num_scheduled_tokens[name] < request.num_prompt_tokens:
                self.prompts.add(self.number)
        self.preempted += step.preempted_req_ids or ()
        chunks = {name: self.scheduler.requests[name].is_prefill_chunk for name in step.num_scheduled_tokens}
        self._unanswered.append((step, chunks))
        if len(self._unanswered) > self._late:
            self._answer(*self._unanswered.popleft())
        self.number += 1
        return list(step.num_scheduled_tokens)

    def _answer(self, step: Any, chunks: dict[str, bool]) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(step.num_scheduled_tokens)
        tokens: list[list[int]] = [[] if chunks[name] else [7] for name in names]
        self.scheduler.update_from_output(
            step, ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        )
        for name in names:
            if name not in self.scheduler.requests:
                self.ended.setdefault(name, self.number)

    def run(self, arrivals: dict[str, tuple[int, dict[str, int]]]) -> None:
        """Steps until every one of `arrivals` (step, arguments of `add`), which come in order of their steps, has ended."""
        coming = deque(sorted(arrivals.items(), key=lambda item: item[1][0]))
        while coming or self.scheduler.requests or any(chunks for _, chunks in self._unanswered):
            while coming and coming[0][1][0] <= self.number:
                name, (_, arguments) = coming.popleft()
                self.add(name, **arguments)
            self.step()
            assert self.number < 20_000


@functools.cache
def config_of(wait: int, asynchronous: bool, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"max_model_len": 384, "max_num_seqs": 8, "dtype": "float32", "enable_prefix_caching": False}
    plugin = {CONFIG_KEY: [{**SETTINGS, "cohort_wait": wait}]}
    config = EngineArgs(str(TARGET), additional_config=plugin, **{**defaults, **arguments}).create_engine_config()
    if asynchronous:  # the CPU platform has forced it off
        from vllm_spec_plugins.engine import activation
        from vllm_spec_plugins.engine.settings import settings_of

        config.scheduler_config.async_scheduling = True
        activation.check(config, settings_of(config))
    return config


@pytest.fixture
def scheduler() -> Callable[..., Steps]:
    def make(wait: int = WAIT, blocks: int = 4096, asynchronous: bool = False, **arguments: Any) -> Steps:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config = config_of(wait, asynchronous, **arguments)
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
        kv = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        made = config.scheduler_config.get_scheduler_cls()(config, kv, StructuredOutputManager(config), 16)
        assert (type(made).__name__.endswith("CohortScheduler")) == (wait > 0)
        return Steps(made)

    return make


def arrivals(seed: int, count: int = 60, every: float = 12.0) -> dict[str, tuple[int, dict[str, int]]]:
    rng = random.Random(seed)
    steps, found = 0.0, {}
    for i in range(count):
        steps += rng.expovariate(1 / every)
        found[f"r{i}"] = (int(steps), {"prompt": rng.randrange(1, 60), "tokens": rng.randrange(20, 80)})
    return found


def waves(steps: Iterable[int]) -> int:
    """Runs of steps that follow each other."""
    ordered = sorted(steps)
    return sum(step - 1 not in ordered for step in ordered)


def test_the_setting_chooses_the_class_by_itself(scheduler: Callable[..., Steps]) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    assert type(scheduler(wait=0).scheduler).__module__.startswith("vllm.")
    assert not isinstance(scheduler().scheduler, AsyncScheduler)
    assert isinstance(scheduler(asynchronous=True).scheduler, AsyncScheduler)


def test_a_scheduler_of_the_users_is_refused_beside_it(scheduler: Callable[..., Steps]) -> None:
    with pytest.raises(SettingError, match=r"cohort_wait=20 .* --scheduler-cls some.Class; give only one"):
        scheduler(scheduler_cls="some.Class")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_idle_engine_and_one_at_the_first_level_admit_at_once(
    scheduler: Callable[..., Steps], asynchronous: bool
) -> None:
    steps = scheduler(asynchronous=asynchronous)
    steps.run({"first": (0, {}), "second": (5, {}), "later": (80, {})})
    assert steps.entered == {"first": 0, "second": 5, "later": 80}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_comes_late_waits_and_all_that_wait_enter_together(
    scheduler: Callable[..., Steps], asynchronous: bool
) -> None:
    # The first is at its second level from its 17th generated token on.
    steps = scheduler(asynchronous=asynchronous)
    late = {f"late{i}": (22 + 3 * i, {}) for i in range(4)}
    steps.run({"first": (0, {"tokens": 100}), **late})
    assert {steps.entered[name] for name in late} == {22 + WAIT}
    assert steps.scheduler.held == {}


def test_the_log_says_how_long_requests_were_held_in_words_that_the_bench_reads(
    scheduler: Callable[..., Steps], caplog: pytest.LogCaptureFixture
) -> None:
    from vllm_spec_plugins.tools.arrivals import Held

    steps = scheduler()
    steps.run({"first": (0, {"tokens": 100}), "late": (22, {}), "later": (30, {})})
    caplog.clear()
    steps.step()  # vLLM's last one, which tells the workers who has gone
    assert Held.read(caplog.text) == Held(2, WAIT, WAIT)


def test_who_waits_enters_as_soon_as_nothing_runs(scheduler: Callable[..., Steps]) -> None:
    steps = scheduler()
    steps.run({"first": (0, {"tokens": 30}), "late": (24, {})})
    assert steps.ended["first"] == 29
    assert steps.entered["late"] == 30


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_request_waits_longer_than_the_bound_beyond_vllms_scheduler(
    scheduler: Callable[..., Steps], seed: int, asynchronous: bool
) -> None:
    coming = arrivals(seed)
    ours, theirs = (scheduler(wait, max_num_seqs=64, asynchronous=asynchronous) for wait in (WAIT, 0))
    ours.run(coming)
    theirs.run(coming)
    late = [ours.entered[name] - theirs.entered[name] for name in coming]
    assert len(ours.ended) == len(theirs.ended) == len(coming)
    assert min(late) >= 0
    assert max(late) <= WAIT
    assert sum(late) > 0
    assert waves(ours.prompts) < waves(theirs.prompts)


def test_with_all_places_taken_only_held_steps_count(scheduler: Callable[..., Steps], seed: int) -> None:
    steps = scheduler(max_num_seqs=4)
    counted: dict[str, int] = {}
    held, room = steps.scheduler._holds, []

    def watch() -> bool:
        holds = held()
        if holds:
            room.append(len(steps.scheduler.running))
            for name in steps.scheduler.held:
                counted[name] = counted.get(name, 0) + 1
        return holds

    steps.scheduler._holds = watch
    coming = arrivals(seed, every=2.0)
    steps.run(coming)
    assert len(steps.ended) == len(coming)
    assert counted
    assert max(counted.values()) <= WAIT
    assert max(room) < 4


def test_a_held_request_can_be_aborted(scheduler: Callable[..., Steps]) -> None:
    steps = scheduler()
    steps.add("first", tokens=60)
    for _ in range(22):
        steps.step()
    steps.add("held")
    steps.add("other")
    steps.step()
    assert set(steps.scheduler.held) == {"held", "other"}
    steps.abort("held")
    steps.run({})
    assert "held" not in steps.entered
    assert set(steps.ended) == {"first", "other"}


def test_priorities_order_a_wave(scheduler: Callable[..., Steps]) -> None:
    steps = scheduler(scheduling_policy="priority", max_num_seqs=3)
    late = {"c": (24, {"priority": 3}), "b": (25, {"priority": 2}), "a": (26, {"priority": 1})}
    steps.run({"first": (0, {"tokens": 100}), **late})
    assert steps.entered["a"] == steps.entered["b"] == 24 + WAIT
    assert steps.entered["c"] > steps.entered["b"]


def test_a_prompt_in_progress_is_never_held_half_way(scheduler: Callable[..., Steps]) -> None:
    steps = scheduler(max_num_batched_tokens=32, max_num_seqs=8, enable_chunked_prefill=True)
    steps.add("first", tokens=100)
    for _ in range(22):
        steps.step()
    steps.add("long", prompt=200)
    while "long" not in steps.step():
        pass
    steps.add("behind")  # comes while the prompt is read: the steps are deep anyway
    request = steps.scheduler.requests["long"]
    before = 0
    while request.num_output_tokens == 0:
        assert request.num_computed_tokens > before
        before = request.num_computed_tokens
        steps.step()
    steps.run({})
    assert steps.entered["long"] == 22 + WAIT
    assert set(steps.ended) == {"first", "long", "behind"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preempted_requests_resume_and_everything_ends(
    scheduler: Callable[..., Steps], seed: int, asynchronous: bool
) -> None:
    steps = scheduler(blocks=12, asynchronous=asynchronous)
    coming = arrivals(seed, every=3.0)
    steps.run(coming)
    assert steps.preempted
    assert set(steps.ended) == set(coming)


def test_a_pause_by_the_user_stays_in_force(scheduler: Callable[..., Steps]) -> None:
    from vllm.v1.core.sched.interface import PauseState

    steps = scheduler()
    steps.add("first", tokens=60)
    for _ in range(22):
        steps.step()
    steps.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    steps.add("new")
    for _ in range(2 * WAIT):
        steps.step()
    assert steps.scheduler.pause_state == PauseState.PAUSED_NEW
    assert "new" not in steps.entered
    steps.scheduler.set_pause_state(PauseState.UNPAUSED)
    steps.run({})
    assert "new" in steps.ended
