# SPDX-License-Identifier: Apache-2.0
"""The comparison of untuned and fine-tuned models under their schedules."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.scheduled import compare, load, table
from tests.models.train import HERE
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools.train import data


def test_each_checkpoint_stands_beside_the_target_under_its_own_schedule(tmp_path: Path) -> None:
    target = HERE / "target"
    plans = {"whole": Schedule(8, 8, 8), "half": Schedule(8, 5, 3, max_tokens=16), "worse": Schedule(8, 8, 8)}
    for name, schedule in plans.items():
        shutil.copytree(target, tmp_path / name)
        (tmp_path / name / "skipdecode.json").write_text(json.dumps(asdict(schedule)))
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] / 4
    save_file(weights, tmp_path / "worse" / "model.safetensors", metadata={"format": "pt"})
    model = load(target)
    stream = data.tokens(HERE / "heldout_prompts.jsonl", model.checkpoint.tokenizer)
    figures = compare(target, [tmp_path / name for name in plans], data.spread(stream, 48, 8), 16)
    whole, half, worse = figures["rows"]
    full = figures["all_layers"]
    assert (whole["untuned"], whole["tuned"]) == pytest.approx((full, full))
    assert half["untuned"] == pytest.approx(half["tuned"])
    assert half["untuned"] > full + 0.2
    assert half["tuned_all_layers"] == pytest.approx(full)
    assert worse["untuned"] == pytest.approx(full)
    assert worse["tuned"] > full + 0.2
    last = table(figures).splitlines()[-1]
    assert last.startswith("| worse | 8 to 8 of 8 | 8.00 | ")
    assert f"{worse['tuned']:.3f}" in last
    with torch.no_grad():
        windows = data.spread(stream, 48, 8)
        assert full == pytest.approx(model.loss(windows, None, 16).item(), abs=1e-5)
