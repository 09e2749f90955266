# SPDX-License-Identifier: Apache-2.0
"""Plans as files and as text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.depth_settings import SelfDraftSettings
from vllm_spec_plugins.layers import plan_file
from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.plan_file import PlanFile
from vllm_spec_plugins.layers.search import SkipSearch
from vllm_spec_plugins.layers.searched import SearchedPlan

PLAN = LayerPlan.skipping(8, attention=[2, 3], mlp=[3, 5])


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = PlanFile("some/model", PLAN, 0.8125, 32)
    written.write(tmp_path / "plan.json")
    assert plan_file.read(tmp_path / "plan.json", 8) == written
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["attention"] == [2, 3] and content["mlp"] == [3, 5] and content["share"] == 0.75


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read (No such file or directory); make it with vllm-spec tune self-draft"),
        ("{", "is not JSON; make it with vllm-spec tune self-draft"),
        ("[3, 4]", "does not list the attention and mlp blocks to skip"),
        ('{"num_layers": 8, "attention": [1]}', "does not list the attention and mlp blocks to skip"),
        (
            '{"model": "m", "num_layers": 8, "agreement": 1, "prompts": 1, "attention": [true], "mlp": []}',
            "does not list the attention and mlp blocks to skip",
        ),
        (
            '{"model": "m", "num_layers": 6, "agreement": 0.5, "prompts": 1, "attention": [1], "mlp": []}',
            "is for a model of 6 layers (m); this one has 8",
        ),
        (
            '{"model": "m", "num_layers": 8, "agreement": 0.5, "prompts": 1, "attention": [9], "mlp": []}',
            "there is no layer 9 in a model of 8",
        ),
    ],
)
def test_a_file_that_is_no_plan_for_the_model_is_refused_in_one_sentence(
    text: str | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingError) as error:
        SelfDraftSettings.parse({"skip": str(path)}).planner(8)
    assert str(error.value).startswith(f"--plugin self-draft: skip={path}")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_a_plan_skips_is_text_that_makes_the_plan() -> None:
    assert PLAN.skipped == "2a-3-5m"
    assert LayerPlan.full(8).skipped == ""
    search = SkipSearch(8)
    for plan in (PLAN, search.best, *(LayerPlan.prefix(8, i) for i in range(1, 8))):
        assert LayerPlan.parse_skip(plan.skipped, 8) == plan


def test_skip_names_blocks_a_file_or_a_search(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PlanFile("some/model", PLAN, 0.8, 32).write(path)
    nowhere = np.zeros(1, dtype=np.int64)
    for skip in ("2a-3-5m", str(path)):
        assert SelfDraftSettings.parse({"skip": skip}).planner(8).plan(nowhere) == PLAN
    given = {"skip": "auto", "skip_share": 0.25, "search_every": 3, "search_budget": 0.5}
    planner = SelfDraftSettings.parse(given).planner(8)
    assert isinstance(planner, SearchedPlan)
    assert (planner.every, planner.budget, planner.search.most) == (3, 0.5, 5)
    assert planner.plan(nowhere) == planner.search.best


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"skip": "3", "search_every": 4}, "search_every=4 belongs to skip=auto; leave"),
        ({"exit_layer": 3, "skip_share": 0.4}, "skip_share=0.4 belongs to skip=auto; leave"),
        ({"skip": "auto", "skip_share": 0.99}, "skip_share=0.99 is out of range; valid are 0.05 to 0.9"),
        ({"skip": "auto", "exit_layer": 3}, "give one of them"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingError, match="self-draft") as error:
        SelfDraftSettings.parse(given)
    assert sentence in str(error.value)


def test_a_model_of_two_layers_has_nothing_to_search() -> None:
    with pytest.raises(SettingError, match="skip=auto cannot be used: a model of 2 layers has none between"):
        SelfDraftSettings.parse({"skip": "auto"}).planner(2)
