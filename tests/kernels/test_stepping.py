# SPDX-License-Identifier: Apache-2.0
"""Programs in step (cpu/lockstep.py) compute what Triton's interpreter computes with one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(seed: int, how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.kernels.stepping", str(seed), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_programs_that_part_compute_what_each_computes_by_itself(seed: int) -> None:
    found, expected = run(seed, "in-step"), run(seed, "one-by-one")
    assert found.pop("parted") > 20 and expected.pop("parted") == 0
    refused = found.pop("refused")
    assert "programs part behind an atomic operation" in refused and expected.pop("refused") == ""
    assert set(expected["visits"]) == {1} and -1 in expected["steps"] and -1 in expected["place"]
    assert found == expected
