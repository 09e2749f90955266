# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind, and what an engine makes of them in how many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.engine.conftest import LANE
from tests.engine.test_requests import SCHEMA

TOKENS = 24 if LANE else 48  # a step of eight requests takes half a second there

SAMPLINGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "greedy": lambda i: {"temperature": 0.0},
    "sampled": lambda i: {"temperature": 0.8, "top_p": 0.9, "seed": i},
    "mixed": lambda i: [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": i},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.05, "seed": i},
        {"temperature": 0.6, "seed": i, "repetition_penalty": 1.2, "logprobs": 1},
    ][i % 4],
    # Every second request; what follows the grammar's end is free.
    "constrained": lambda i: {"temperature": i % 4 / 4, "seed": i, **({"json": SCHEMA} if i % 2 == 0 else {})},
}


def generate(
    llm: Any, prompts: list[list[int]], sampling: list[dict[str, Any]], max_tokens: int = TOKENS
) -> tuple[list[list[int]], float]:
    """Token ids, and tokens per step of the target after the prompts."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.current_step
    params = []
    for each in sampling:
        given: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True, **each}
        if schema := given.pop("json", None):
            given["structured_outputs"] = StructuredOutputsParams(json=schema)
        params.append(SamplingParams(**given))
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    tokens = [list(result.outputs[0].token_ids) for result in results]
    return tokens, (max_tokens - 1) / max(1, scheduler.current_step - before - 1)
