# SPDX-License-Identifier: Apache-2.0
"""What is compiled is compiled at the start: no request waits for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

import vllm_spec_plugins

MODULES = [
    "cpu.kernels.loops",
    "cpu.kernels.tree_attention",
    "tree.loops",
    "tree.ranks_loops",
    "tree.union_loops",
    "proposers.loops",
]


def compiled() -> dict[str, list[Any]]:
    """The types that each compiled loop has been compiled for so far."""
    modules = [importlib.import_module(f"vllm_spec_plugins.{name}") for name in MODULES]
    return {
        f"{module.__name__}.{name}": list(loop.signatures)
        for module in modules
        for name, loop in vars(module).items()
        if hasattr(loop, "signatures")
    }


@pytest.mark.cpu_lane("loops are compiled there only")
def test_serving_compiles_nothing(engine: Callable[..., Any], prompts: list[list[int]]) -> None:
    from vllm import SamplingParams

    llm = engine(vllm_spec_plugins.engine_args("lookahead", adapt=False))
    before = compiled()
    # Those that a step calls. What they call themselves is listed only where it was compiled, not where it was loaded.
    ready = {name.rpartition(".")[2] for name, types in before.items() if types}
    assert ready >= {"cut_each", "each_noised", "draw_reached", "depths", "walk_end", "accept_down_to"}
    assert ready >= {"scheduled", "trie", "history_guesses"}
    loops = "def f(self):\n    self.a = 1\n" * 6
    prompts = [*prompts[:6], llm.get_tokenizer().encode(loops)]
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95, "seed": 1},
        {"temperature": 0.8, "top_k": 40},
        {"temperature": 1.0},
        {"temperature": 0.7, "repetition_penalty": 1.1, "logprobs": 2},
    ]
    for together in (1, len(prompts)):
        for begin in range(0, len(prompts), together):
            part = prompts[begin : begin + together]
            for shift in range(len(choices)):
                params = [
                    SamplingParams(max_tokens=24, **choices[(i + shift) % len(choices)]) for i in range(len(part))
                ]
                llm.generate([{"prompt_token_ids": prompt} for prompt in part], params, use_tqdm=False)
    assert compiled() == before
