# SPDX-License-Identifier: Apache-2.0
"""What needs a GPU: `make test-gpu`, in an environment that has vLLM for CUDA. Without a GPU it fails and says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before vllm is imported: the engine core stays in this process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Before triton compiles anything. Without it float32 products in vLLM's own attention are rounded to 10 bits (TF32), and text
# is compared here token for token.
os.environ["TRITON_F32_DEFAULT"] = "ieee"

MODELS = Path(__file__).parents[1] / "models"
TARGET = MODELS / "target"


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.exit(
            f"tests/gpu needs a CUDA GPU, and torch {torch.__version__} finds none on this machine", returncode=1
        )


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts from held-out text as token ids, of different lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (MODELS / "heldout_prompts.jsonl").read_text().splitlines()[:24]
    return [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """Makes engines on the tiny target, in float32 with Triton attention, and keeps them: the same arguments, the same engine."""
    made: dict[str, Any] = {}

    def make(*plugins: str, **settings: Any) -> Any:
        from vllm import LLM

        import vllm_spec_plugins

        key = repr((plugins, sorted(settings.items())))
        if key not in made:
            defaults: dict[str, Any] = {
                "dtype": "float32",
                "attention_backend": "TRITON_ATTN",
                "max_model_len": 384,
                "max_num_seqs": 8,
                "kv_cache_memory_bytes": 1 << 28,
                "gpu_memory_utilization": 0.1,
                "disable_log_stats": False,
            }
            asked = vllm_spec_plugins.engine_args(*plugins) if plugins else {}
            made[key] = LLM(str(TARGET), **asked, **{**defaults, **settings})
        return made[key]

    return make
