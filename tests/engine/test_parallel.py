# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: the ranks come to the same trees and the same paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.cpu_lane("ranks are processes of their own, and the interpreter is on in this one")
@pytest.mark.timeout(420)
def test_output_on_two_ranks_is_plain_decodings_on_two_ranks() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.engine.parallel_run"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    line = next((line for line in process.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, process.stdout[-2000:] + process.stderr[-2000:]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["mixture"] == found["none"]
    assert found["accepted by mixture"][0] > 20
    assert found["accepted by none"] == []
