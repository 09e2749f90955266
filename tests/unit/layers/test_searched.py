# SPDX-License-Identifier: Apache-2.0
"""When a search asks for scores, on which text, and what that costs."""

from __future__ import annotations

import numpy as np

from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.search import Costs, SkipSearch
from vllm_spec_plugins.layers.searched import SearchedPlan


def searched(**settings: float) -> SearchedPlan:
    return SearchedPlan(SkipSearch(8), **settings)  # type: ignore[arg-type]


def test_scoring_takes_no_more_than_its_share_of_the_work() -> None:
    planner = searched(budget=0.05, every=2, window=20)
    planner.measured(Costs(attention=1.0, mlp=2.0, rest=5.0))
    work = scored = 0.0
    scores = 0
    for step in range(4000):
        planner.stepped(requests=2)
        planner.drafted(10)
        work += 2 + 10 * planner.search.costs.of(planner.search.best)
        if planner.due():
            plan = planner.ask(step // 200)
            if plan is None:
                continue
            scored += 20 * planner.search.costs.of(plan)
            planner.tell(plan, 10, 20)
            scores += 1
        assert scored <= 0.05 * work
    assert scores > 50
    assert scored > 0.04 * work


def test_scores_are_so_many_steps_apart() -> None:
    planner, at = searched(budget=10.0, every=7, window=20), []
    for step in range(100):
        planner.stepped(requests=8)
        if planner.due():
            plan = planner.ask(step)
            assert plan is not None
            planner.tell(plan, 10, 20)
            at.append(step)
    assert set(np.diff(at)) == {7}


def test_the_best_plan_is_scored_first_on_a_text_and_a_text_is_used_up() -> None:
    planner = searched(per_text=3)
    best = planner.search.best
    asked = []
    while (plan := planner.ask("first")) is not None:
        asked.append(plan)
        planner.tell(plan, 0 if plan != best else 25, 50)
    assert asked[0] == best and best not in asked[1:] and len(set(asked)) == 4
    assert planner.ask("first") is None
    assert planner.ask("second") == best
    assert [score.reference for score in planner.search.scores] == [None, 0.5, 0.5, 0.5]


def test_a_plan_that_looks_better_is_scored_again_on_another_text_before_it_drafts() -> None:
    planner, nowhere = searched(), np.zeros(1, dtype=np.int64)
    best = planner.search.best
    planner.tell(planner.ask("first"), 20, 50)  # type: ignore[arg-type]
    better = planner.ask("first")
    assert better is not None
    planner.tell(better, 50, 50)
    assert planner.ask("first") is None
    assert planner.plan(nowhere) == best
    assert planner.ask("second") == best
    planner.tell(best, 20, 50)
    assert planner.ask("second") == better
    planner.tell(better, 49, 50)
    assert planner.plan(nowhere) == better
    # What comes next on this text is compared with the new best plan's score on it.
    following = planner.ask("second")
    assert following is not None and following != better
    planner.tell(following, 1, 50)
    assert planner.search.scores[-1].reference == 0.98


def test_a_search_that_is_over_asks_for_nothing() -> None:
    planner = SearchedPlan(SkipSearch(8, rounds=2), budget=10.0, every=1, window=10)
    for _ in range(2):
        planner.stepped(requests=8)
        planner.stepped(requests=8)
        assert planner.due()
        planner.tell(planner.ask("text") or LayerPlan.full(8), 5, 10)
    for _ in range(20):
        planner.stepped(requests=8)
        assert not planner.due()
