# SPDX-License-Identifier: Apache-2.0
"""The whole step as a GPU runs it, on an engine: nothing of it makes the host wait, and the text is plain decoding's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.decoding import generate
from tests.engine.disguise import disguise

PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "lookahead": ("lookahead", {}),
    "window": ("lookahead", {"window": 4, "ngram": 4, "guesses": 3, "min_chance": 0.0}),
    "jacobi": ("jacobi", {"block": 4}),
    "medusa": ("medusa", {"model": str(MODELS / "medusa"), "min_chance": 0.0}),
    "specinfer": ("specinfer", {"model": str(MODELS / "draft"), "min_chance": 0.0}),
}


TOKENS = 24
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_p": 0.9, "top_k": 50, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.3},
    {"temperature": 0.0, "logprobs": 3},
]


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any], prompts: list[list[int]]) -> list[list[int]]:
    return generate(engine(vllm_spec_plugins.engine_args("none")), prompts[:5], REQUESTS, TOKENS)[0]


@pytest.mark.parametrize("name", PLUGINS)
def test_no_stage_of_a_step_makes_the_host_wait(
    name: str,
    engine: Callable[..., Any],
    plain: list[list[int]],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin, settings = PLUGINS[name]
    steps = disguise(monkeypatch)
    llm = engine(vllm_spec_plugins.engine_args(plugin, adapt=False, **settings), max_num_batched_tokens=64)
    found, _ = generate(llm, prompts[:5], REQUESTS, TOKENS)
    assert found == plain
    assert steps.accepted > 5
    for stage in ("begin_step", "tree_positions", "verify", "postprocess_state", "propose", "set_draft_tokens"):
        assert steps.ran[stage] > 2 * steps.warm, stage
