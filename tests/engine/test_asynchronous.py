# SPDX-License-Identifier: Apache-2.0
"""Asynchronous scheduling, as on a GPU: a step is scheduled, all its rows reserved, before the last one's tokens are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.disguise import disguise
from tests.engine.test_requests import SCHEMA

NODES = 7
# Default thresholds leave nodes out, whose rows are computed all the same; without one, trees are full.
PLUGINS: dict[str, dict[str, Any]] = {
    "lookahead": {},
    "medusa": {"model": str(MODELS / "medusa"), "min_chance": 0.0},
    "specinfer": {"model": str(MODELS / "draft")},
}
# Prompts in chunks beside the others' rows; blocks for about half of the requests; a context that one of them runs into.
TIGHT = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 96,
    "max_model_len": 176,
    "block_size": 32,
    "num_gpu_blocks_override": 14,
}
EOS = 1
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 40},
    {"temperature": 0.8, "max_tokens": 24},
    {"temperature": 0.0, "max_tokens": 5, "repetition_penalty": 1.2},
    {"temperature": 0.9, "max_tokens": 48, "top_p": 0.9, "logprobs": 2},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 0.0, "max_tokens": 400},
    {"temperature": 0.7, "max_tokens": 48, "ignore_eos": False, "logit_bias": {EOS: 12.0}},
    {"temperature": 0.0, "max_tokens": 32, "json": SCHEMA},
]
ABORTED = {3: 6, 8: 3}  # given up when they have so many tokens
PLACE = 13  # at the latest, of the token that ends a request of the second half


@dataclass
class Text:
    """What came of a request."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    stop: int | str | None = None


def params_of(i: int, **given: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    each = {"ignore_eos": True, "seed": i, **SAMPLINGS[i % len(SAMPLINGS)], **given}
    if schema := each.pop("json", None):
        each |= {"structured_outputs": StructuredOutputsParams(json=schema), "ignore_eos": False}
    return SamplingParams(**each, output_kind=RequestOutputKind.DELTA)


def serve(llm: Any, prompts: list[list[int]], params: list[Any], aborted: dict[int, int]) -> list[Text]:
    """Requests that come one after the other while others run; those of `aborted` are given up with so many tokens."""
    engine, texts = llm.llm_engine, [Text() for _ in prompts]
    waiting, steps = list(range(len(prompts))), 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 2 == 0:
            i = waiting.pop(0)
            engine.add_request(f"request-{i}", {"prompt_token_ids": prompts[i]}, params[i])
        steps += 1
        for output in engine.step():
            i, (one,) = int(output.request_id.removeprefix("request-")), output.outputs
            texts[i].tokens += one.token_ids
            texts[i].reason, texts[i].stop = one.finish_reason, one.stop_reason
            if len(texts[i].tokens) >= aborted.get(i, len(texts[i].tokens) + 1) and not output.finished:
                engine.abort_request([output.request_id])
    return texts


@dataclass
class Reference:
    """What plain decoding gives each request, scheduled synchronously."""

    prompts: list[list[int]]
    params: list[Any]
    texts: list[Text]


@pytest.fixture(scope="module")
def reference(engine: Callable[..., Any], prompts: list[list[int]]) -> Reference:
    llm, prompts = engine(vllm_spec_plugins.engine_args("none"), max_model_len=TIGHT["max_model_len"]), prompts[:16]
    free = serve(llm, prompts, [params_of(i) for i in range(len(prompts))], {})
    ends = [text.tokens[min(PLACE, len(text.tokens) // 2)] for text in free]
    params = [params_of(i, stop_token_ids=[end] if i > 8 else []) for i, end in enumerate(ends)]
    texts = serve(llm, prompts, params, {})
    assert sum(text.stop is not None for text in texts) >= 5
    assert any(text.tokens[-1] == EOS and text.reason == "stop" for text in texts)
    assert any(len(p) + len(text.tokens) == TIGHT["max_model_len"] for p, text in zip(prompts, texts, strict=True))
    return Reference(prompts, params, texts)


@dataclass
class Seen:
    """What the scheduler did."""

    drafts: list[int] = field(default_factory=list)  # rows reserved for drafts, per request and step
    cut: int = 0  # steps whose accepted path went on behind the end of the text
    preempted: int = 0
    late: int = 0  # requests whose end was not known when their next step was scheduled


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    seen = Seen()
    schedule, update = AsyncScheduler.schedule, AsyncScheduler._update_request_with_output

    def scheduled(self: Any, *args: Any) -> Any:
        step = schedule(self, *args)
        seen.drafts += [len(tokens) for tokens in step.scheduled_spec_decode_tokens.values()]
        seen.preempted += len(step.preempted_req_ids or ())
        return step

    def updated(self: Any, request: Any, tokens: list[int], **given: Any) -> Any:
        sampled = len(tokens)
        kept, stopped = update(self, request, tokens, **given)
        seen.cut += stopped and len(kept) < sampled
        seen.late += stopped and request.num_output_placeholders > 0
        return kept, stopped

    monkeypatch.setattr(AsyncScheduler, "schedule", scheduled)
    monkeypatch.setattr(AsyncScheduler, "_update_request_with_output", updated)
    return seen


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", PLUGINS)
def test_text_is_plain_decodings_while_a_step_is_always_under_way(
    name: str, where: str, engine: Callable[..., Any], reference: Reference, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, sampled and constrained requests of all lengths: some end inside an accepted path, some are given up."""
    monkeypatch.setenv("VLLM_SPEC_CPU_ASYNC", "1")
    steps = disguise(monkeypatch) if where == "device" else None
    llm = engine(vllm_spec_plugins.engine_args(name, nodes=NODES, **PLUGINS[name]), async_scheduling=True, **TIGHT)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling and runner.speculator.fixed_shape
    texts = serve(llm, reference.prompts, reference.params, ABORTED)
    for i, (found, expected) in enumerate(zip(texts, reference.texts, strict=True)):
        if i in ABORTED:
            assert ABORTED[i] <= len(found.tokens) < len(expected.tokens) and found.reason is None
            assert found.tokens == expected.tokens[: len(found.tokens)]
        else:
            assert found == expected, i
    assert seen.drafts.count(NODES) > 0.9 * len(seen.drafts)  # fewer at the end of the context, or of a step's budget
    assert int(runner.req_states.draft_tokens.min()) >= 0, "a placeholder would be computed as a token"
    assert seen.cut >= 2 and seen.late >= 5 and seen.preempted
    if steps is not None:
        assert steps.accepted > 20
        assert min(steps.ran.values()) > 2 * steps.warm
