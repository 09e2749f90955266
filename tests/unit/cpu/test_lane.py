# SPDX-License-Identifier: Apache-2.0
"""The lane knows which kernels it covers; every other one is refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.cpu import lane

ROOT = Path(__file__).parents[3]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def survey() -> dict[str, Any]:
    run = python("-m", "tests.unit.cpu.survey")
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_every_version_stands_in_its_kernels_place(survey: dict[str, Any]) -> None:
    assert survey["not_overridden"] == []


def test_no_triton_function_of_the_runner_stays_a_plain_function(survey: dict[str, Any]) -> None:
    assert survey["left_plain"] == []


def test_launching_an_uncovered_kernel_says_which_feature_needs_it(survey: dict[str, Any]) -> None:
    kernels = {name: text for name, text in survey["uncovered"].items() if name.endswith("_kernel")}
    assert kernels
    for name, text in kernels.items():
        assert name in text
        assert lane.feature_of(name) is not None, f"{name} is new: cover it, or name its feature in lane.UNCOVERED"
        assert text.startswith(f"{lane.feature_of(name)} cannot be used with --plugin on a CPU")


def test_asking_for_the_other_runner_is_a_contradiction() -> None:
    run = python("-c", "from vllm_spec_plugins import cpu; cpu.install()", VLLM_USE_V2_MODEL_RUNNER="0")
    assert run.returncode == 1
    assert "VLLM_USE_V2_MODEL_RUNNER=0 contradicts --plugin" in run.stderr


def test_the_interpreter_is_refused_once_vllm_is_imported() -> None:
    code = "import vllm.platforms; from vllm_spec_plugins.cpu import interpreted; interpreted.enable()"
    run = python("-c", code)
    assert run.returncode == 1
    assert "must be enabled before vllm is imported" in run.stderr
