# SPDX-License-Identifier: Apache-2.0
"""SkipDecode's schedule: budgets that never grow, so that what a token reads was computed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm_spec_plugins import registry
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.layers.schedule import Schedule


def schedules() -> list[Schedule]:
    chosen = random.Random(1)
    found = []
    for _ in range(200):
        layers = chosen.randint(1, 40)
        high = chosen.randint(1, layers)
        low = chosen.randint(1, high)
        warmup, levels = chosen.randint(0, low), chosen.choice([0, 2, 3, 4, 9])
        found.append(Schedule(layers, high, low, warmup, chosen.randint(max(2, levels), 90), levels))
    return found


def test_a_later_token_runs_part_of_the_layers_of_an_earlier_one() -> None:
    for schedule in schedules():
        before = schedule.num_layers
        for place in range(schedule.max_tokens + 2):
            budget = schedule.budget(place)
            assert budget <= before, schedule
            plan = schedule.plan(budget)
            assert sum(plan.attention) == budget
            if place and budget != before:
                assert all(
                    old or not new for old, new in zip(schedule.plan(before).attention, plan.attention, strict=True)
                )
            before = budget


def test_it_runs_from_the_first_budget_to_the_last_and_stays_there() -> None:
    for schedule in schedules():
        assert schedule.budget(0) == schedule.max_layers
        assert schedule.budget(schedule.max_tokens - 1) == schedule.budget(10**6) == schedule.min_layers
        assert schedule.distinct[0] == schedule.max_layers and schedule.distinct[-1] == schedule.min_layers
        if schedule.levels:
            assert len(schedule.distinct) <= schedule.levels


def test_the_first_layers_always_run_and_those_between_are_left_out() -> None:
    schedule = Schedule(num_layers=10, max_layers=8, min_layers=4, warmup=2)
    assert str(schedule.plan(4)) == "0 1 8 9"
    assert str(schedule.plan(8)) == "0 1 4 5 6 7 8 9"
    assert [schedule.needs(layer) for layer in range(10)] == [0, 0, 10, 9, 8, 7, 6, 5, 4, 3]


def test_prompts_run_all_layers_and_places_are_looked_up_together() -> None:
    schedule = Schedule(num_layers=12, max_layers=9, min_layers=3, max_tokens=7, levels=0)
    places = np.array([-40, -1, 0, 3, 6, 7, 500])
    assert schedule.of_places(places).tolist() == [12, 12, 9, 6, 3, 3, 3]


@pytest.mark.parametrize("levels", [0, 2, 4])
def test_a_speedup_is_the_layers_of_the_model_by_the_average(levels: int) -> None:
    for speedup in (1.5, 2.0, 3.0, 4.0):
        schedule = Schedule.for_speedup(48, speedup, levels=levels)
        assert schedule.average == pytest.approx(48 / speedup, abs=0.6)
        assert schedule.max_layers == pytest.approx(2 * schedule.min_layers, abs=2)


def test_schedules_that_compute_other_kv_have_other_keys() -> None:
    found = schedules()
    distinct = {(s.num_layers, s.warmup, s.max_tokens, tuple(s.budgets.tolist())) for s in found}
    assert len({schedule.key for schedule in found}) >= len(distinct)


def test_it_says_what_it_is() -> None:
    schedule = Schedule(num_layers=8, max_layers=8, min_layers=2, max_tokens=64)
    assert str(schedule) == "8, 6, 4, 2 of 8 layers over 64 tokens, 5.0 on average, the first 1 always"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("max_layers=9,min_layers=2", "max_layers=9 is more than the 8 layers of the model; use max_layers=8 or less"),
        ("speedup=2,warmup=9", "warmup=9 is more than the 8 layers of the model; use warmup=8 or less"),
    ],
)
def test_a_schedule_for_a_deeper_model_is_refused(given: str, sentence: str) -> None:
    settings = registry.resolve(f"skipdecode:{given}")
    schedule = registry.method_of(settings).schedule
    assert schedule is not None
    with pytest.raises(SettingError, match=f"^--plugin skipdecode: {sentence}$"):
        schedule(settings, 8)
