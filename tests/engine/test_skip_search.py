# SPDX-License-Identifier: Apache-2.0
"""A draft that looks for its skip set while it serves: the same text, the same K/V, and scores that are the part's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vllm_spec_plugins
from tests.engine.conftest import TARGET
from tests.engine.decoding import SAMPLINGS, generate
from tests.models.llama import load_checkpoint, rms_norm
from vllm_spec_plugins.layers.plan import LayerPlan

LAYERS = 8
# Scores as often as the text allows.
EAGER = {"min_chance": 0.0, "adapt": False, "skip": "auto", "search_every": 1, "search_budget": 10.0}


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def searching(engine: Callable[..., Any], plain: Any) -> Any:
    return engine(vllm_spec_plugins.engine_args("self-draft", **EAGER))


def scorer(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator.drafters[0].scorer


def test_scoring_leaves_text_and_kv_cache_as_they_are_and_counts_what_the_part_guesses_alone(
    plain: Any, searching: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, one = load_checkpoint(TARGET), scorer(searching)
    plans, texts = set(), []
    score = one.score

    def check(plan: LayerPlan, text: Any) -> int:
        look = len(texts) % 8 == 0
        before = [cache.clone() for cache in one.draft.caches] if look else []
        found = score(plan, text)
        assert all(torch.equal(cache, old) for cache, old in zip(one.draft.caches, before, strict=False))
        plans.add(plan)
        texts.append(text)
        if plan == LayerPlan.prefix(LAYERS, plan.exit_layer):  # whose K/V is the whole model's
            known = one.draft.req_states.all_token_ids.gpu[text.slot, : text.first + text.count + 1].long()
            with torch.inference_mode():
                stream = alone.hidden(known[None, :-1], exits=(plan.exit_layer,))[0][0, text.first :]
                guesses = (rms_norm(stream, alone.norm) @ alone.head.T).argmax(-1)
            assert found == int((guesses == known[text.first + 1 :]).sum())
        return found

    monkeypatch.setattr(one, "score", check)
    sampling = [SAMPLINGS["mixed"](i) for i in range(12)]
    expected, _ = generate(plain, prompts[:12], sampling, max_tokens=64)
    assert generate(searching, prompts[:12], sampling, max_tokens=64)[0] == expected
    assert len(plans) > 20
    exits = {plan.exit_layer for plan in plans if plan.exit_layer < LAYERS}
    assert exits == set(range(1, LAYERS))
    places = [(t.tenant, place) for t in set(texts) for place in range(t.first, t.first + t.count)]
    assert len(set(texts)) > 2 and len(places) == len(set(places)), "a text was read twice"


def test_tight_memory_chunked_prompts_and_the_prefix_cache_give_plain_decodings_text(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the text under score is preempted, and with a window wider than a step."""
    small = {"max_num_batched_tokens": 48, "max_num_seqs": 4, "num_gpu_blocks_override": 9, "max_model_len": 192}
    llm = engine(vllm_spec_plugins.engine_args("self-draft", **EAGER, nodes=12), block_size=32, **small)
    one, texts, moved = scorer(llm), set(), []
    assert one.window == 48
    score, add = one.score, one.add_request
    monkeypatch.setattr(one, "score", lambda plan, text: (texts.add(text), score(plan, text))[1])
    monkeypatch.setattr(one, "add_request", lambda slot: (moved.append(slot), add(slot))[1])
    sampling = [SAMPLINGS["mixed"](i) for i in range(6)]
    for _ in range(2):  # the second time prompts are in the prefix cache
        expected, _ = generate(plain, prompts[:6], sampling, max_tokens=72)
        assert generate(llm, prompts[:6], sampling, max_tokens=72)[0] == expected
    assert len(moved) > 12, "nothing was preempted"
    assert len({text.tenant for text in texts}) > 2


def test_blocks_cost_what_their_weights_are(searching: Any) -> None:
    """Of the tiny target: 256 wide, 8 and 4 heads of 32, 384 between, 4096 tokens."""
    from vllm_spec_plugins.engine.skip_search import costs

    found = costs(scorer(searching).draft.parts)
    assert found.attention == 256 * (256 + 2 * 128) + 256 * 256
    assert found.mlp == 3 * 256 * 384
    assert found.rest == 256 * 4096
    assert scorer(searching).planner.search.costs == found
