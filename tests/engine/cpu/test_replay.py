# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs with trees: a replay reads this step's trees where the capture found chains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_metadata_that_was_captured_gives_every_later_steps_result(seed: int) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.cpu.replay", str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    shown = json.loads(run.stdout.strip().splitlines()[-1])
    assert len(shown) == 24
    assert [what for what, holds in shown.items() if not holds] == []
