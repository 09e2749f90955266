# SPDX-License-Identifier: Apache-2.0
"""The simulation of admission policies, against sums done by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools import cli, cohorts, traces
from vllm_spec_plugins.tools.cohorts import MEASURED, POLICIES, SHIPPED, StepCost, simulate
from vllm_spec_plugins.tools.traces import Arrival

COST = StepCost(fixed=1.0, layer=10.0, row=0.5)
SCHEDULE = Schedule(8, max_layers=6, min_layers=2, max_tokens=4, levels=2)  # 6, 6, 2, 2, 2, ...
AT_ONCE = next(policy for policy in POLICIES if policy.admission is cohorts.AtOnce)
OURS = next(policy for policy in POLICIES if policy.name == SHIPPED)


def test_one_request_costs_what_its_steps_cost() -> None:
    found = simulate([Arrival(3.0, prompt=5, output=4)], SCHEDULE, AT_ONCE, 0, COST, slots=2)
    prompt = 1 + 10 * 8 + 0.5 * 8 * 5
    steps = [1 + 10 * n + 0.5 * n for n in (6, 6, 2)]
    assert found.first_token == pytest.approx((prompt / 1e3,) * 2)
    assert found.per_token == pytest.approx(sum(steps) / 3e3)
    assert found.answer == pytest.approx((prompt + sum(steps)) / 1e3)
    assert found.tokens_per_second == pytest.approx(4 / found.answer)
    assert (found.steps, found.longest_held, found.depth) == (4, 0, (8 + 6 + 6 + 2) / 4)


def test_a_step_is_as_deep_as_its_deepest_row_and_a_prompt_makes_it_full() -> None:
    # The second comes during the first step: it reads its prompt beside place 0 of the first and stays one behind.
    found = simulate([Arrival(0.0, 1, 4), Arrival(0.001, 1, 4)], SCHEDULE, AT_ONCE, 0, COST, slots=2)
    assert found.steps == 5
    assert found.depth == (8 + 8 + 6 + 6 + 2) / 5


def test_a_long_prompt_is_read_in_several_steps() -> None:
    found = simulate([Arrival(0.0, cohorts.MAX_BATCHED + 1, 1)], SCHEDULE, AT_ONCE, 0, COST, slots=1)
    assert found.steps == 2


def test_with_one_place_requests_are_served_one_after_the_other() -> None:
    one, three = (simulate([Arrival(0.0, 1, 4)] * n, SCHEDULE, AT_ONCE, 0, COST, slots=1) for n in (1, 3))
    assert three.steps == 3 * one.steps
    assert three.tokens_per_second == pytest.approx(one.tokens_per_second)


def test_no_policy_holds_longer_than_the_bound_and_all_serve_the_same_tokens(seed: int) -> None:
    trace = traces.poisson(24, 2.0, 8, (4, 60), seed)
    schedule, cost = Schedule.for_speedup(24, 2.0, max_tokens=32), StepCost.fit()
    tokens = sum(arrival.output for arrival in trace)
    for policy in POLICIES:
        found = simulate(trace, schedule, policy, 12, cost, slots=24)
        assert found.longest_held <= 12, policy.name
        assert found.steps >= tokens / 24
        assert found.answer > found.first_token[0] > 0
    assert simulate(trace, schedule, AT_ONCE, 12, cost, 24).longest_held == 0


def test_rows_that_pause_go_on_after_the_bound() -> None:
    deep = next(policy for policy in POLICIES if policy.runs is cohorts.deep_first)
    # A newcomer every few steps keeps the deepest level busy for as long as newcomers come.
    trace = [Arrival(0.05 * i, 1, 40) for i in range(30)]
    schedule, cost = Schedule.for_speedup(24, 2.0, max_tokens=32), StepCost(1.0, 1.0, 0.0)
    bounded, unbounded = (simulate(trace, schedule, deep, wait, cost, slots=30) for wait in (2, 10_000))
    assert bounded.per_token < unbounded.per_token


def test_requests_that_are_alike_go_down_together_with_the_shipped_policy() -> None:
    trace = traces.poisson(64, 1.0, 16, (128, 128), seed=1)
    schedule, cost = Schedule.for_speedup(24, 2.0, max_tokens=128), StepCost.fit()
    ours, theirs = (simulate(trace, schedule, policy, 64, cost, slots=8) for policy in (OURS, AT_ONCE))
    assert ours.depth < theirs.depth
    assert ours.tokens_per_second > theirs.tokens_per_second
    assert 0 < ours.longest_held <= 64


def test_the_cost_of_a_step_is_fitted_to_measurements(tmp_path: Path) -> None:
    lines = [(24, 192), (24, 80), (8, 64), (16, 100)]
    path = tmp_path / "steps.jsonl"
    path.write_text(
        "".join(json.dumps({"deepest": d, "layers": n, "milliseconds": COST(d, n)}) + "\n" for d, n in lines)
    )
    found = StepCost.read(path)
    assert [found.fixed, found.layer, found.row] == pytest.approx([1.0, 10.0, 0.5])
    # What stands in the tool comes within a tenth of every figure that it was fitted to.
    assert all(StepCost.fit()(d, n) == pytest.approx(ms, rel=0.1) for d, n, ms in MEASURED)
    with pytest.raises(ValueError, match="do not give a cost each"):
        StepCost.fit([(24, 192, 206.0), (24, 192, 205.0)])


def test_a_trace_is_the_same_for_a_seed_and_has_the_rate_that_was_asked_for(seed: int) -> None:
    made = traces.poisson(4000, 2.0, 10, (5, 9), seed)
    assert made == traces.poisson(4000, 2.0, 10, (5, 9), seed)
    assert made != traces.poisson(4000, 2.0, 10, (5, 9), seed + 1)
    assert made[0].seconds == 0
    assert made[-1].seconds == pytest.approx(2000, rel=0.15)
    assert {arrival.output for arrival in made} == set(range(5, 10))
    bursts = traces.poisson(4000, 2.0, 10, (5, 9), seed, burst=8)
    assert len({arrival.seconds for arrival in bursts}) == 500
    assert bursts[-1].seconds == pytest.approx(2000, rel=0.3)


def test_a_recorded_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"seconds": 2, "prompt": 3, "output": 4}\n{"seconds": 0.5, "prompt": 1, "output": 2}\n')
    assert traces.read(path) == [Arrival(0.5, 1, 2), Arrival(2, 3, 4)]
    for wrong in ('{"seconds": 2}', '{"seconds": -1, "prompt": 3, "output": 4}', "x"):
        path.write_text(f'{{"seconds": 2, "prompt": 3, "output": 4}}\n{wrong}\n')
        with pytest.raises(ValueError, match="line 2"):
            traces.read(path)


def test_the_command_prints_a_table_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cohorts.json"
    argv = ["bench", "cohorts", "--prompts", "6", "--max-tokens", "12", "--rate", "1", "--speedup", "2", "--seed", "3"]
    assert cli.main([*argv, "--json", str(path)]) == 0
    assert SHIPPED in capsys.readouterr().out
    lines = json.loads(path.read_text())["loads"][0]["outcomes"]
    assert [line["policy"] for line in lines] == ["all layers", *(policy.name for policy in POLICIES)]
    assert cli.main([*argv, "--trace", str(tmp_path / "absent")]) == 2


def test_the_ratio_is_to_vllms_own_admission_at_the_same_schedule() -> None:
    found = cohorts.compare([Arrival(0.0, 1, 20), Arrival(0.2, 1, 20)], [2.0, 4.0], 8, COST, slots=2)
    text = io.StringIO()
    Console(file=text, width=200).print(cohorts.table(found, "title"))
    rows = [[cell.strip() for cell in line.split("\u2502")] for line in text.getvalue().splitlines() if "vLLM" in line]
    theirs = [outcome for outcome in found if outcome.policy == AT_ONCE.name]
    assert [row[3:5] for row in rows] == [[f"{o.tokens_per_second:.1f}", "1.00"] for o in theirs]
