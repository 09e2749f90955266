# SPDX-License-Identifier: Apache-2.0
"""vllm-spec tune finds a plan on prompts, and self-draft takes its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS, TARGET
from tests.engine.decoding import SAMPLINGS, generate
from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.tools import cli

COMMON = [
    "--model",
    str(TARGET),
    "--dtype",
    "float32",
    "--max-model-len",
    "384",
    "--kv-cache-memory-bytes",
    str(1 << 26),
]


def test_a_tuned_plan_is_drafted_with_and_the_text_is_plain_decodings(
    engine: Callable[..., Any], prompts: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "plans" / "plan.json"
    data = ["--data", str(MODELS / "heldout_prompts.jsonl"), "--prompts", "16", "--passes", "1", "--max-tokens", "96"]
    assert cli.main(["tune", "self-draft", *COMMON, *data, "--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["num_layers"] == 8 and 8 <= content["prompts"] <= 16
    assert 0.3 < content["agreement"] < 1.0

    plain = engine(vllm_spec_plugins.engine_args("none"))
    llm = engine(vllm_spec_plugins.engine_args("self-draft", skip=str(path), adapt=False))
    sampling = [SAMPLINGS["mixed"](i) for i in range(4)]
    expected, _ = generate(plain, prompts[:4], sampling)
    assert generate(llm, prompts[:4], sampling)[0] == expected
    drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator.drafters[0]
    assert drafter.plan == LayerPlan.skipping(8, content["attention"], content["mlp"])
    assert drafter.plan.share == content["share"] < 1


def test_answers_too_short_to_score_and_wrong_files_end_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    given = ["tune", "self-draft", *COMMON, "--output", str(path)]
    assert cli.main([*given, "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "No such file" in capsys.readouterr().out
    assert cli.main([*given[:-1], str(tmp_path / "plan.txt"), "--prompt", "x"]) == 2
    assert "does not end in .json" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*given, "--prompt", "def f(", "--passes", "1", "--max-tokens", "8"]) == 1
    assert "no answer was long enough" in " ".join(capsys.readouterr().out.split())
    assert not path.exists()
