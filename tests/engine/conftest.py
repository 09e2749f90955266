# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, on the trained tiny target, in float32."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# Before vllm is imported: the engine core stays in this process, and its threads go where the system puts them.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# "interpreted": what a GPU would run as a Triton kernel, vLLM's and ours, runs under Triton's interpreter. "": the CPU's lane.
LANE = os.environ.get("TEST_LANE", "")
if LANE:
    from vllm_spec_plugins.cpu import interpreted

    assert LANE == "interpreted", f"TEST_LANE={LANE}: valid is interpreted"
    interpreted.enable()
    from vllm_spec_plugins.kernels import tree_attention

    # Larger tiles are fewer operations for the interpreter: half of the kernel's time. A GPU's are looked at in tests/kernels.
    tree_attention._TILES.update(
        {kind: (replace(tiles[0], pairs=64, tokens=64),) for kind, tiles in tree_attention._TILES.items()}
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the interpreted lane, what `cpu_lane("why")` marks is left out."""
    for item in items:
        mark = item.get_closest_marker("cpu_lane")
        if LANE and mark is not None:
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))


MODELS = Path(__file__).parents[1] / "models"
TARGET = MODELS / "target"


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts from held-out text as token ids, of different lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (MODELS / "heldout_prompts.jsonl").read_text().splitlines()[:24]
    texts = [json.loads(line) for line in lines]
    return [tokenizer(text["prompt"])["input_ids"] for text in texts]


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """Makes engines. They live as long as the process: shutting one down tears down what all of them share."""
    made: list[Any] = []

    def make(plugin: dict[str, Any] | None, **settings: Any) -> Any:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "model": str(TARGET),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 384,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 1 << 27,
            "disable_log_stats": False,
        }
        made.append(LLM(**(plugin or {}), **{**defaults, **settings}))
        return made[-1]

    return make
