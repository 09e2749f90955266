# SPDX-License-Identifier: Apache-2.0
"""Each version of a kernel does what vLLM's interpreted kernel does, on random batches with poisoned outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.cpu.kernels import KERNELS

HERE = Path(__file__).parent
CASES = [
    name
    for area in ("inputs", "sampling", "rejection", "drafting")
    for name in re.findall(r"^def (\w+)\(draw: Draw\) -> tuple", (HERE / f"parity_{area}.py").read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def parity() -> dict[str, Any]:
    """The verdicts of parity.py, run once: Triton's interpreter must be on before vllm is imported."""
    seed = int(os.environ.get("TEST_SEED") or int.from_bytes(os.urandom(4)) >> 2)
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.cpu.parity", str(seed)],
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {"seed": seed, **json.loads(run.stdout.strip().splitlines()[-1])}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_interpreted_kernel(parity: dict[str, Any], name: str) -> None:
    verdict = parity["cases"][name]
    assert verdict == "", f"TEST_SEED={parity['seed']}: {verdict}"


def test_every_kernel_of_the_lane_is_compared(parity: dict[str, Any]) -> None:
    assert set(parity["kernels"]) == set(KERNELS)
