# SPDX-License-Identifier: Apache-2.0
"""Engines whose attention and kernels are those of a GPU, interpreted: the text is that of plain decoding on the CPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.cpu.conftest import ROOT, Request
from tests.engine.decoding import generate

TOKENS = 16
TIMEOUT = 600  # seconds; the first test waits for all engines
PLUGINS: dict[str, dict[str, Any]] = {
    "lookahead": {"nodes": 7, "adapt": False, "min_chance": 0.0},
    "medusa": {"model": str(MODELS / "medusa"), "nodes": 7, "adapt": False, "min_chance": 0.0},
    "specinfer": {"model": str(MODELS / "draft"), "nodes": 7, "depth": 3, "adapt": False, "min_chance": 0.0},
}
EIGHT_BITS = {f"{name} in 8 bits": name for name in ("none", "medusa", "specinfer")}
ENGINES = {
    **{name: {"plugin": name, "settings": settings, "arguments": {}} for name, settings in PLUGINS.items()},
    **{
        label: {"plugin": name, "settings": PLUGINS.get(name, {}), "arguments": {"kv_cache_dtype": "fp8"}}
        for label, name in EIGHT_BITS.items()
    },
}
SCALES = [0.001, 0.002]  # 448 times that is the largest key, and value: so little that texts show it
# Rows of the target's graphs: batches of 1 and of 4 requests with trees of 7 nodes.
SIZES = [8, 32]


@pytest.fixture(scope="module")
def batch(prompts: list[list[int]]) -> list[Request]:
    params = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}]
    return [
        {"prompt": prompts[i][:20], "params": {"max_tokens": TOKENS, "ignore_eos": True, **each}}
        for i, each in enumerate(params)
    ]


@pytest.fixture(scope="module")
def served(batch: list[Request]) -> dict[str, Any]:
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"TEST_SEED={seed}")
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.cpu.served"],
        cwd=ROOT,
        input=json.dumps({"engines": ENGINES, "scales": SCALES, "batch": batch, "sizes": SIZES, "seed": seed}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT - 60,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any], batch: list[Request]) -> list[list[int]]:
    prompts, params = [each["prompt"] for each in batch], [each["params"] for each in batch]
    return generate(engine(vllm_spec_plugins.engine_args("none")), prompts, params, TOKENS)[0]


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("name", PLUGINS)
def test_text_is_plain_decodings(name: str, served: dict[str, Any], plain: list[list[int]]) -> None:
    found = served[name]
    assert found["tokens"] == plain
    assert found["attention"] == ["TritonTreeImpl"] and found["bytes"] == [4]
    assert found["launches"]["scaled"] == 0
    if name != "lookahead":  # which has to have seen some of the text
        assert found["steps"] < TOKENS, "no drafts were accepted: the test is too easy"
    for kernel in ("kernel_unified_attention", "reshape_and_cache_kernel_flash", "tree_attention_kernel"):
        assert found["launches"][kernel] > 0


@pytest.mark.timeout(TIMEOUT)
def test_text_is_plain_decodings_when_a_drafts_passes_are_replayed(
    served: dict[str, Any], plain: list[list[int]]
) -> None:
    found = served["specinfer"]["replayed"]
    assert found["tokens"] == plain
    assert found["replays"] > TOKENS // 2
    assert min(found["checked"].values()) > 5, "the draft was not compared with itself alone"


@pytest.mark.timeout(TIMEOUT)
def test_a_drafts_replayed_passes_are_those_of_the_batch_at_hand(served: dict[str, Any]) -> None:
    shown = served["specinfer"]["replayed"]["shown"]
    assert len(shown) == 12
    assert [what for what, holds in shown.items() if not holds] == []


@pytest.mark.timeout(TIMEOUT)
def test_text_from_8_bit_caches_is_that_of_none_with_such_caches(
    served: dict[str, Any], plain: list[list[int]]
) -> None:
    """Greedy and seeded; the draft model's caches have 8 bits too."""
    none, *drafting = (served[label] for label in EIGHT_BITS)
    pairs = zip(none["tokens"], plain, strict=True)
    assert all(ours != theirs for ours, theirs in pairs), "8 bits change nothing: the test is too easy"
    assert none["launches"]["kernel_unified_attention"] > 0 and "tree_attention_kernel" not in none["launches"]
    for found in drafting:
        assert found["tokens"] == none["tokens"]
        assert found["steps"] < TOKENS, "no drafts were accepted: the test is too easy"
        assert found["launches"]["scaled"] == found["launches"]["tree_attention_kernel"] > 0
    for found in (none, *drafting):
        assert found["attention"] == ["TritonTreeImpl"] and found["bytes"] == [1]
