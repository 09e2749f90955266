# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from vllm_spec_plugins.layers.cohorts import Cohorts
from vllm_spec_plugins.layers.schedule import Schedule

# 16 layers for the first 64 tokens of an answer, then 13, 11, 8.
COHORTS = Cohorts(Schedule.for_speedup(24, 2.0), wait=50)


def test_nobody_waits_for_nothing() -> None:
    assert COHORTS.opens([], [0], [0])


def test_a_request_joins_where_it_makes_no_step_deeper() -> None:
    assert COHORTS.opens([200, 63], [0], [0])
    assert not COHORTS.opens([200, 64], [0], [0])


def test_a_request_joins_while_a_prompt_is_read_since_all_layers_run() -> None:
    assert COHORTS.opens([200, -1], [0], [0])


def test_a_preempted_request_resumes_beside_requests_of_its_level() -> None:
    assert COHORTS.opens([100, 120], [90], [0])
    assert not COHORTS.opens([130, 150], [90], [0])


def test_the_longest_held_opens_the_wave_for_all() -> None:
    assert not COHORTS.opens([100], [0, 0, 0], [49, 3, 0])
    assert COHORTS.opens([100], [0, 0, 0], [50, 3, 0])


@pytest.mark.parametrize("levels", [0, 2, 4])
def test_holding_ends_at_the_bound_and_only_when_the_batch_is_past_the_first_level(levels: int, seed: int) -> None:
    rng = random.Random(seed)
    schedule = Schedule.for_speedup(24, 3.0, levels=levels)
    cohorts = Cohorts(schedule, wait=rng.randrange(1, 40))
    for _ in range(200):
        running = [rng.randrange(300) for _ in range(rng.randrange(1, 9))]
        held = [rng.randrange(50) for _ in range(rng.randrange(1, 5))]
        deepest = max(schedule.budget(place) for place in running)
        holds = not cohorts.opens(running, [0] * len(held), held)
        assert holds == (deepest < schedule.max_layers and max(held) < cohorts.wait)
