# SPDX-License-Identifier: Apache-2.0
"""`vllm-spec bench cache`: its traffic, its table, its report. What the policies are worth stands in test_eviction.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_spec_plugins.tools import bench, caching


def test_traffic_is_zipf_with_costs_that_follow_popularity_as_named(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = {costs: caching.traffic(costs, 1.0, rng, 1000, 50_000) for costs in {line[0] for line in caching.LINES}}
    for given in made.values():
        counts = np.bincount(given.asked, minlength=1000)
        assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)
    slope = {costs: np.polyfit(np.log(np.arange(1, 1001)), np.log(given.cost), 1)[0] for costs, given in made.items()}
    assert slope.pop("equal") == pytest.approx(0.0, abs=1e-9)
    wanted = {"independent": 0.0, "popular cheap": 0.5, "popular dear": -0.5}
    assert slope == {costs: pytest.approx(power, abs=0.3) for costs, power in wanted.items()}


def test_the_bench_writes_every_line_and_the_same_for_the_same_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caching, "REQUESTS", 500)
    monkeypatch.setattr(caching, "TRAFFICS", 2)
    found = []
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        assert bench.main(["cache", "--seed", seed, "--json", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name).read_text())["lines"])
    assert found[0] == found[1] != found[2]
    assert [(line["costs"], line["exponent"], line["entries"]) for line in found[0]] == list(caching.LINES)
    assert all(0 < share <= 1 for line in found[0] for share in (*line["cost"].values(), line["optimum"]))
    shown = capsys.readouterr().out
    assert "popular cheap" in shown
    assert f"{found[0][0]['cost']['lec']:.3f}" in shown
