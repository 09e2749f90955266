# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec tune cascade``: a file that serves, losses that are what the text says, and what cannot be tuned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS, TARGET
from tests.engine.decoding import generate
from vllm_spec_plugins.cascade.calibration import Calibrated, calibrate
from vllm_spec_plugins.cascade.rules import deferral_rule
from vllm_spec_plugins.tools import cascade as tuning
from vllm_spec_plugins.tools import cli

STAGE = "self-draft:exit_layer=4"
ASKED = {
    "model": str(TARGET),
    "plugin": STAGE,
    "data": str(MODELS / "heldout_prompts.jsonl"),
    "max_model_len": 384,
    "kv_cache_memory_bytes": 1 << 26,
}


def arguments(output: Path, **given: Any) -> list[str]:
    every = {**ASKED, "output": str(output), "dtype": "float32", **given}
    return ["tune", "cascade", *(f"--{key.replace('_', '-')}={value}" for key, value in every.items())]


def test_the_file_holds_the_boldest_rule_that_the_losses_allow_and_serves(
    engine: Callable[..., Any], tmp_path: Path, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = engine(vllm_spec_plugins.engine_args("none"))
    file = tmp_path / "cascade.json"
    given = {"quality": 0.85, "error": 0.2, "prompts": 24, "tokens": 24, "bounds": "1,-0.1,-1"}
    assert cli.main(arguments(file, **given)) == 0
    found, shown = Calibrated.load(str(file)), capsys.readouterr().out
    assert (found.quality, found.error, found.prompts, found.tokens) == (0.85, 0.2, 24, 24)
    assert found.plugin["exit_layer"] == 4 and found.target["num_layers"] == 8
    assert f"cascade:file={file}" in shown and found.rule in shown
    figures = json.loads(file.read_text())["figures"]
    assert [each["bound"] for each in figures] == [-1.0, -0.1, 1.0]  # safest first
    assert figures[0]["loss"] == 0.0 < figures[2]["loss"]
    assert figures[2]["tokens_per_step"] > figures[0]["tokens_per_step"] > 1
    assert found.rule in ("difference:-1", "difference:-0.1")
    assert found.loss == figures[1 if found.rule == "difference:-0.1" else 0]["loss"]

    served = f"cascade:file={file},quality=0.8,route=cheap,adapt=false"
    llm = engine(vllm_spec_plugins.engine_args(f"{STAGE},adapt=false", served))
    named = engine(vllm_spec_plugins.engine_args(f"{STAGE},adapt=false", f"cascade:rule={found.rule},route=cheap"))
    greedy = [{"temperature": 0.0}] * 4
    assert generate(llm, prompts[:4], greedy) == generate(named, prompts[:4], greedy)
    by_bound, _ = tuning.measure(llm, prompts[:4], 24, deferral_rule("difference:0"), (-1.0, 1.0), "cheap")
    assert by_bound[-1.0] == [0.0] * 4
    text, _ = tuning.answers(llm, prompts[:1], 24, {"route": "cheap", "threshold": 1.0})
    wrong = 0  # token by token on another engine
    for i, token in enumerate(text[0]):
        (chosen,) = generate(plain, [prompts[0] + text[0][:i]], [{"temperature": 0.0}], max_tokens=1)[0]
        wrong += chosen != [token]
    assert tuning.losses(llm, prompts[:1], text) == [wrong / len(text[0])]
    assert calibrate(by_bound, deferral_rule("difference:0"), 0.5, 0.5) is not None


def test_a_quality_that_nothing_keeps_is_said_and_no_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cascade.json"
    given = {"quality": 0.995, "error": 0.9, "prompts": 24, "tokens": 16, "bounds": "1"}
    assert cli.main(arguments(file, **given)) == 1
    assert "No bound can be shown to keep a quality of 0.995" in capsys.readouterr().out
    assert not file.exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"quality": 0.99, "error": 0.01, "prompts": 20},
            "has 20 prompts; to promise 0.99 with an error of 0.01 at least 459",
        ),
        ({"rule": "chow"}, "--rule chow: has no grid of bounds; give --bounds"),
        (
            {"rule": "exit:margin", "bounds": "3"},
            "--rule exit:margin: exit:margin:3 names an exit policy that cannot be used",
        ),
        (
            {"rule": "difference", "bounds": "0,3"},
            "--rule difference: 3 is out of range for difference; valid are -1 to 1",
        ),
        ({"plugin": "lookahead"}, "lookahead: has no model that could be the cheap stage of --plugin cascade"),
        ({"plugin": "self-draft:skip=auto"}, "skip=auto changes while serving"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_sentence_before_a_model_is_loaded(
    given: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path / "cascade.json", **given)) == 2
    shown = capsys.readouterr().out
    assert sentence in shown and shown.count("\n") == 1
