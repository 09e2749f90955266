# SPDX-License-Identifier: Apache-2.0
"""The whole step as a GPU runs it, on an engine: nothing of it makes the host wait, and the text is plain decoding's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.decoding import generate
from tests.engine.disguise import disguise
from tests.models.llama import load_checkpoint
from tests.no_sync import on_host

pytestmark = pytest.mark.cpu_lane("tensors in disguise are answered by torch, never by a kernel")

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


def check_draft(llm: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The draft model says of every text and path what it says alone: what it reads again, keeps and leaves out is right."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    alone, (one,), checked = load_checkpoint(MODELS / "draft"), runner.speculator.drafters, {"begin": 0, "extend": 0}
    begin, extend = one.begin, one.extend

    def check(found: Any, b: int, path: list[int], stage: str) -> None:
        slot, root = int(on_host(one.slots)[b]), int(on_host(one.step.roots)[b])
        text = on_host(one.req_states.all_token_ids.gpu)[slot, : root + 1].tolist()
        expected = alone.logits(torch.tensor([text + path]))[0, -1]
        torch.testing.assert_close(on_host(found), expected, rtol=1e-3, atol=1e-3)
        checked[stage] += 1

    def check_begin(ctx: Any) -> Any:
        logits = begin(ctx)
        for b, emitted in enumerate(on_host(ctx.num_emitted).tolist()):
            if emitted:
                check(logits[b], b, [], "begin")
        return logits

    def check_extend(tree: Any, request: Any, row: Any) -> Any:
        logits = extend(tree, request, row)
        tokens, parents = on_host(tree.tokens).tolist(), on_host(tree.parents).tolist()
        for line, (b, at) in enumerate(zip(on_host(request).tolist(), on_host(row).tolist(), strict=True)):
            # Of a request inside its prompt nothing comes to anything.
            if line % 5 == 0 and tokens[b][at - 1] >= 0 and int(on_host(one.grown_at)[int(on_host(one.slots)[b])]) >= 0:
                path: list[int] = []
                while at:
                    path, at = [tokens[b][at - 1], *path], parents[b][at - 1]
                check(logits[line], b, path, "extend")
        return logits

    monkeypatch.setattr(one, "begin", check_begin)
    monkeypatch.setattr(one, "extend", check_extend)
    return checked


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
    checked = check_draft(llm, monkeypatch) if name == "specinfer" else {}
    found, _ = generate(llm, prompts[:5], REQUESTS, TOKENS)
    assert found == plain
    assert steps.accepted > 5
    assert all(count > 30 for count in checked.values())
    for stage in ("begin_step", "tree_positions", "verify", "postprocess_state", "propose", "set_draft_tokens"):
        assert steps.ran[stage] > 2 * steps.warm, stage
