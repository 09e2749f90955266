# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/cascade.md: the arithmetic, the stages by themselves on the tiny family, the table and the plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import cascade
from tests.models.cascade import EXIT, Cheap, Point, Text, above, agreement, alternatives
from tests.models.evaluate import prompts
from tests.models.llama import Llama, load_checkpoint
from tests.models.train import HERE
from vllm_spec_plugins.cascade.rules import deferral_rule


@pytest.fixture(scope="module")
def target() -> Iterator[Llama]:
    with torch.inference_mode():
        yield load_checkpoint(HERE / "target")


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    return [text for text in prompts(64) if text.shape[1] >= 24][:16]


def test_a_curve_is_compared_with_the_best_mixture_at_no_more_layers() -> None:
    low, high = Point("s", "always cheap", 0, 0, 4.0, 0.8, 0), Point("s", "always full", 0, 1, 8.0, 1.0, 0)
    waste = replace(high, layers=6.0, agreement=0.7)
    between = replace(low, layers=6.0, agreement=0.95)
    found = above([between, replace(low, layers=5.0), replace(high, layers=9.0)], [low, high, waste])
    assert [lead for _, lead in found] == pytest.approx([0.05, -0.05, 0.0])


@pytest.mark.parametrize("stage", cascade.STAGES)
def test_a_stage_alone_answers_as_it_reads_and_agrees_with_the_target_less_than_that_does(
    stage: str, target: Llama, texts: list[torch.Tensor]
) -> None:
    cheap = Cheap(stage, target)
    assert cheap.layers == EXIT if stage.startswith("first") else 0 < cheap.layers < 1
    ids = torch.stack([text[0, :24] for text in texts])
    given, sure = cheap.answer(ids, 6)
    logits = cheap.logits(torch.cat((ids, given), 1))[:, 23:-1]
    assert torch.equal(logits.argmax(-1), given)
    assert torch.allclose(logits.softmax(-1).amax(-1), sure, atol=1e-4)
    best = ids
    for _ in range(6):
        best = torch.cat((best, target.logits(best)[:, -1:].argmax(-1)), 1)
    assert agreement(target, ids, best[:, 24:]).tolist() == [1.0] * len(ids)
    assert 0.2 < agreement(target, ids, given).mean() < 0.98


def test_accuracy_is_the_full_models_at_a_rules_exact_end_and_the_cheap_stages_at_its_bold_one(
    target: Llama, texts: list[torch.Tensor]
) -> None:
    cheap = Cheap("draft model", target)
    text = Text.read(cheap, target, texts)
    ids = torch.stack([each[0, :24] for each in texts])
    alone, full, *switched = alternatives("draft model", cheap, target, ids, text)
    assert text.accuracy(deferral_rule("difference:-1")) == pytest.approx(full.accuracy)
    assert text.accuracy(deferral_rule("difference:1")) == pytest.approx(alone.accuracy)
    assert alone.accuracy < full.accuracy
    assert (switched[0].passes, switched[0].agreement) == (0.0, pytest.approx(alone.agreement))
    assert (switched[-1].passes, switched[-1].layers) == (1.0, pytest.approx(cheap.layers + 8))
    assert [p.passes for p in switched] == sorted(p.passes for p in switched)


def test_table_and_plot_show_every_way(tmp_path: Path) -> None:
    points = [
        Point("first 4 layers", way, bound, bound, 4 + bound, 0.9, 0.4)
        for way in ("always cheap", "always full", "request switching", *cascade.SWEEPS)
        for bound in ((0.5, 0.7) if not way.startswith("always") else (0.0,))
    ]
    assert cascade.table(points).count("\n") == len(points) + 1
    cascade.plot(points, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("cascade, difference", "request switching", "always full"))
    assert ">milliseconds per token<" not in drawn
    cascade.plot([replace(p, speed=100.0) for p in points], tmp_path / "timed.svg")
    assert ">milliseconds per token<" in (tmp_path / "timed.svg").read_text()
