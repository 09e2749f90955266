# SPDX-License-Identifier: Apache-2.0
"""The engine's noise, sampler and walk against the rules that keep draft probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.models.acceptance import random_pairs
from vllm_spec_plugins.tools import acceptance, cli

SAMPLES = 1500


@pytest.mark.parametrize(
    ("line", "coupled", "rrsw"),
    [
        ((50, 0.7), (0.767, 0.942, 0.996), (0.804, 0.919, 0.979)),
        ((500, 0.7), (0.707, 0.916, 0.993), (0.715, 0.911, 0.989)),
        ((500, 0.4), (0.419, 0.666, 0.893), (0.431, 0.662, 0.879)),
    ],
)
def test_coupled_children_and_the_walk_match_sampling_without_replacement(
    line: tuple[int, float], coupled: Sequence[float], rrsw: Sequence[float], rng: torch.Generator
) -> None:
    """With 1, 2 and 4 children. The figures asked for are of other random pairs: near, not equal."""
    seed = int(torch.randint(1 << 30, (1,), generator=rng))
    found, sampled, independent = random_pairs(line, SAMPLES, seed)
    reference = sampled.tolist()
    print(found, reference)
    assert found.exact
    assert (sampled[1:] > independent[1:]).all()
    assert found.coupled == pytest.approx(coupled, abs=0.1)
    assert reference == pytest.approx(rrsw, abs=0.1)
    assert reference[0] == pytest.approx(found.overlap, abs=1e-3)
    assert found.coupled[0] < reference[0] + 0.01  # one child: no rule beats 1 - TV(p, q)
    assert found.coupled[1] > reference[1] - 0.01
    assert found.coupled[2] > reference[2]
    assert all(given < mine - 0.15 for given, mine in zip(found.likeliest, found.coupled, strict=True))


def test_noise_of_another_stream_finds_the_draw_less_often(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What makes the children good is that their noise is the target's."""
    (coupled,) = acceptance.measure(500, seed, [(50, 0.7)])
    same = acceptance.gumbel_topk
    monkeypatch.setattr(acceptance, "gumbel_topk", lambda *args: same(*args[:2], args[2] + 1000, *args[3:]))
    (other,) = acceptance.measure(500, seed, [(50, 0.7)])
    assert other.exact
    assert all(mine > its + 0.15 for mine, its in zip(coupled.coupled, other.coupled, strict=True))


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "acceptance", "--samples", "40", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "coupled children" in out and "500, 0.4" in out and "seed 5" in out
