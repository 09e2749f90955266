# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/exits.md: the arithmetic, the order of the exits on the tiny target, and the plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import exits
from tests.models.exits import EXITS, Recording, draft, exits_taken, losses, measure, record, references, split
from tests.models.llama import load_checkpoint
from tests.models.train import HERE
from vllm_spec_plugins.layers.exits import policy


def recording(answers: list[list[int]], lengths: list[int]) -> Recording:
    nothing = torch.empty(0)
    return Recording(torch.zeros(len(answers), dtype=torch.int64), lengths, torch.tensor(answers), {}, nothing, 9, 8)


def test_the_share_of_early_answers_that_are_right_and_the_layers_that_ran() -> None:
    """Five tokens leave after 2 (right), 2 (wrong), 4 (right), 8 and 6 (wrong) layers; two prompts."""
    answers = [[1, 1, 1, 1], [2, 1, 1, 1], [0, 3, 5, 3], [1, 2, 3, 4], [1, 1, 2, 1]] + [[1, 1, 1, 1]] * 15
    good = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]] + [[1, 1, 1]] * 15, dtype=torch.bool)
    recorded = recording(answers, [10, 10])
    assert exits_taken(good)[:5].tolist() == [0, 0, 1, 3, 2]
    point = measure(recorded, good, "p", 0.5)
    assert point.layers == pytest.approx((2 + 2 + 4 + 8 + 6 + 15 * 2) / 20)
    assert point.early == pytest.approx(19 / 20)
    assert point.acceptance == pytest.approx(17 / 19)
    assert point.agreement == pytest.approx(18 / 20)
    assert losses(recorded, [good, torch.zeros_like(good)]).tolist() == pytest.approx(
        np.array([[0.2, 0.0], [0.0, 0.0]])
    )
    none = measure(recorded, torch.zeros_like(good), "p", 0.5)
    assert (none.layers, none.early, none.acceptance, none.agreement) == (8.0, 0.0, None, 1.0)
    assert (none.tokens_per_step, none.layers_per_token) == (1.0, 8.0 + 2.0)  # one drafted token, found not good


def test_a_draft_goes_on_while_answers_are_good_and_is_accepted_up_to_the_first_wrong_one() -> None:
    """One place in a prompt of 8 tokens, then two places in one of 9."""
    good = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    right = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    assert draft(good, right, [8], known=False) == (1 + 1, 4)
    assert draft(good, right, [8], known=True) == (1 + 1, 3)
    every = torch.ones(9, dtype=torch.bool)
    assert draft(every, every, [9], known=False) == (1 + 8, 8)
    late = every.clone()
    late[8] = False
    assert draft(every, late, [9], known=True) == (1 + (8 + 7) / 2, 8)
    assert draft(torch.cat((good, every)), torch.cat((right, late)), [8, 9], known=False) == (1 + 16 / 3, (4 + 16) / 3)


def test_policies_are_made_from_files_that_nothing_is_measured_on() -> None:
    training, measured = (({tuple(ids.tolist()) for ids in part}) for part in split())
    assert len(training) > 200 and len(measured) > 200
    assert not training & measured


@pytest.fixture(scope="module")
def recorded() -> Recording:
    asked = {name: policy(f"{name}:1") for name in ("entropy", "margin", "saturation")}
    return record(load_checkpoint(HERE / "target"), split()[1][:24], asked, keep_hidden=True)


def test_margins_tell_right_answers_from_wrong_ones_better_than_saturation_does(recorded: Recording) -> None:
    """At the same number of layers; and an oracle better than any, with fewer layers."""
    *fixed, oracle = references(recorded)
    assert [p.layers for p in fixed] == list(EXITS)
    assert [p.agreement for p in fixed] == sorted(p.agreement for p in fixed)
    assert oracle.agreement == 1.0 and oracle.layers < fixed[1].layers
    half = {}
    for name, scores in recorded.scores.items():
        bound = scores.flatten().quantile(0.6).item()  # two scores in five are good
        half[name] = measure(recorded, scores >= bound, name, bound)
    print(half)
    assert half["margin"].acceptance > half["saturation"].acceptance + 0.05
    assert half["entropy"].acceptance > half["saturation"].acceptance + 0.02


def test_every_sweep_gets_bolder_and_the_plot_shows_it(recorded: Recording, tmp_path: Path) -> None:
    made = exits.made_from(recorded)
    assert list(made) == list(exits.SWEEPS)
    for name, sweep in made.items():
        assert len(sweep) == len(exits.SWEEPS[name])
        if not name.startswith("hash"):
            thresholds = [each.threshold for each in sweep]
            assert thresholds == sorted(thresholds, reverse=True), name
    points = [
        measure(recorded, recorded.scores[name] >= each.threshold, name, bound, each.exits_needed)
        for name in recorded.scores
        for bound, each in zip(exits.SWEEPS[name], made[name], strict=True)
    ]
    for name in recorded.scores:
        layers = [p.layers for p in points if p.policy == name]
        assert layers == sorted(layers, reverse=True)
    exits.plot(points, references(recorded), recorded.layers, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}<" in drawn for name in (*recorded.scores, "oracle", "Acceptance against layers run"))
    assert exits.table(points).count("\n") == len(points) + 1
