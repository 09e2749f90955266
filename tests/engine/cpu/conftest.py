# SPDX-License-Identifier: Apache-2.0
"""Requests decoded in the lanes: each lane in a process of its own, its engine shared by all tests of the session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Request = dict[str, Any]
ROOT = Path(__file__).parents[3]


def job(batches: list[list[Request]], async_scheduling: bool = False, **settings: Any) -> dict[str, Any]:
    """What one engine is to do (`decode.py`)."""
    return {"settings": settings, "batches": batches, "async": async_scheduling}


def decode(lane: str, **jobs: dict[str, Any]) -> dict[str, Any]:
    """What the engines of `jobs` say, in a process of the lane."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.cpu.decode", lane],
        cwd=ROOT,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def word_token() -> tuple[int, str]:
    """A token that is a whole word: its id and text."""
    from transformers import AutoTokenizer

    from tests.engine.cpu.decode import TARGET

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    for token in range(300, 2000):
        text = tokenizer.decode([token])
        if text.isalpha() and tokenizer(text, add_special_tokens=False)["input_ids"] == [token]:
            return token, text
    raise LookupError("the tokenizer has no token that is a whole word")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight prompts from held-out text as token ids, 20 to 90 tokens long."""
    from transformers import AutoTokenizer

    from tests.engine.cpu.decode import TARGET

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (TARGET.parent / "heldout_prompts.jsonl").read_text().splitlines()
    tokens = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    lengths = [20, 31, 32, 33, 47, 64, 65, 90]
    usable = [prompt for prompt in tokens if len(prompt) >= max(lengths)][: len(lengths)]
    return [prompt[:length] for prompt, length in zip(usable, lengths, strict=True)]
