# SPDX-License-Identifier: Apache-2.0
"""Whatever the trees, the output is plain decoding's: an oracle hides the truth in random trees, or always lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import vllm_spec_plugins
from tests.engine.conftest import LANE
from tests.engine.oracle import Oracle
from vllm_spec_plugins import compiled

TOKENS = 40
CALLS = r"((self|os|np)\.[a-z_]{2,12}\([a-z0-9, ]{0,16}\)\n){3,9}"
# Every sampling feature that must be right on a tree's paths; requests take them in turn.
FEATURES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 0.0, "bad_words": ["self.", "return None", "def __"]},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 0.0, "logit_bias": {300: 4.0, 301: -8.0}},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.9, "logprobs": 2, "min_tokens": 20},
    {"temperature": 0.0, "stop": ["(", "self"]},
    {"temperature": 0.9, "stop_token_ids": list(range(260, 300))},
    {"temperature": 0.0, "allowed_token_ids": list(range(200, 1200))},
    {"temperature": 0.0, "regex": CALLS},
    {"temperature": 0.9, "regex": CALLS},
]


@dataclass
class Reference:
    """What plain decoding gives for each request, on the same runner."""

    prompts: list[list[int]]
    params: list[Any]
    outputs: list[list[int]]
    logprobs: list[Any]
    texts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = [p + o for p, o in zip(self.prompts, self.outputs, strict=True)]


def run(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [result.outputs[0] for result in llm.generate(requests, params, use_tqdm=False)]


def differing(llm: Any, reference: Reference) -> list[int]:
    """Indices of the requests whose tokens are not plain decoding's."""
    found = [list(output.token_ids) for output in run(llm, reference.prompts, reference.params)]
    return [i for i, (ours, plain) in enumerate(zip(found, reference.outputs, strict=True)) if ours != plain]


def sampling(features: dict[str, Any], seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    given: dict[str, Any] = {"max_tokens": TOKENS, **features}
    if features["temperature"]:
        given["seed"] = seed
    if regex := given.pop("regex", None):
        given["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return SamplingParams(**given)


@pytest.fixture(scope="module")
def reference(engine: Callable[..., Any], prompts: list[list[int]]) -> Reference:
    llm, prompts = engine(vllm_spec_plugins.engine_args("none")), prompts[: len(FEATURES) + 3]
    params = [sampling(FEATURES[i % len(FEATURES)], seed=i) for i in range(len(prompts))]
    outputs = run(llm, prompts, params)
    assert any(output.finish_reason == "stop" for output in outputs), (
        "no request stops early: the stop strings are unused"
    )
    return Reference(prompts, params, [list(o.token_ids) for o in outputs], [o.logprobs for o in outputs])


# Prompts in chunks of at most 64 tokens beside the others' drafts; blocks for about three requests of eight.
TIGHT = {"max_num_batched_tokens": 96, "block_size": 32, "num_gpu_blocks_override": 14}


@pytest.fixture(scope="module")
def tight(engine: Callable[..., Any]) -> tuple[Any, Oracle]:
    return engine(vllm_spec_plugins.engine_args("oracle"), **TIGHT), Oracle.instances[-1]


@pytest.mark.parametrize("right", [True, False], ids=["hidden-truth", "always-wrong"])
@pytest.mark.parametrize("branching", [True, False], ids=["trees", "chains"])
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "tensors"])
def test_output_is_plain_decodings_under_chunked_prefill_preemption_and_prefix_caching(
    tight: tuple[Any, Oracle],
    reference: Reference,
    right: bool,
    branching: bool,
    loops: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "use_loops", loops)
    llm, oracle = tight
    oracle.prepare(reference.texts, right, branching)
    assert differing(llm, reference) == []
    assert oracle.new_requests > len(reference.prompts), "nothing was preempted: the test is too easy"
    if right:
        assert oracle.accepted > len(reference.prompts) * TOKENS / 4, "the hidden truth was hardly ever found"


def test_a_second_turn_over_generated_text_hits_the_prefix_cache_and_is_plain_decodings(
    tight: tuple[Any, Oracle], reference: Reference
) -> None:
    llm, oracle = tight
    oracle.prepare(reference.texts)
    params = sampling({"temperature": 0.0}, 0)
    chosen = [text for text in reference.texts if len(text) >= 96][:4]
    cached, warm = 0, []
    for text in chosen:
        llm.reset_prefix_cache()
        run(llm, [text[:-TOKENS]], [params])  # writes K/V through trees
        second = llm.generate({"prompt_token_ids": text}, params, use_tqdm=False)[0]
        cached += second.num_cached_tokens - (len(text) - TOKENS) // 32 * 32
        warm.append(list(second.outputs[0].token_ids))
    assert cached > 0, "no block of generated text came from the cache"
    cold = []
    for text in chosen:
        llm.reset_prefix_cache()
        cold.append(list(run(llm, [text], [params])[0].token_ids))
    assert warm == cold


def no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_spec_plugins.engine.kv.PathCommit.__call__", lambda *args: None)


def causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    if LANE:
        from vllm_spec_plugins.engine.triton_attention import TritonTreeBuilder as Ours
    else:
        from vllm_spec_plugins.engine.attention import TreeAttentionBuilder as Ours
    plain = Ours.__mro__[1].build  # type: ignore[attr-defined]

    def build(self: Any, *args: Any, trees: Any = None, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Ours, "build", build)


def linear_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vllm_spec_plugins.engine.model_state.tree_positions", lambda positions, trees, batch: positions
    )


@pytest.mark.parametrize("broken", [no_commit, causal_mask, linear_positions])
def test_without_one_of_the_three_mechanisms_the_output_is_wrong(
    tight: tuple[Any, Oracle],
    reference: Reference,
    broken: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, oracle = tight
    oracle.prepare(reference.texts)
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch:
        broken(patch)
        wrong = differing(llm, reference)
    llm.reset_prefix_cache()  # what the broken run cached must not reach another test
    assert len(wrong) >= len(reference.prompts) // 4, f"only {len(wrong)} requests noticed"


def test_output_is_plain_decodings_with_asynchronous_scheduling(
    engine: Callable[..., Any], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SPEC_CPU_ASYNC", "1")
    llm = engine(vllm_spec_plugins.engine_args("oracle"), async_scheduling=True, **TIGHT)
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    oracle = Oracle.instances[-1]
    for right in (True, False):
        oracle.prepare(reference.texts, right)
        assert differing(llm, reference) == []
        assert oracle.new_requests > len(reference.prompts)
        assert (oracle.accepted > len(reference.prompts) * TOKENS / 4) == right
    constrained = [i for i, params in enumerate(reference.params) if params.structured_outputs is not None]
    oracle.prepare([reference.texts[i] for i in constrained])
    assert differing(llm, reference) == []
    assert oracle.accepted > sum(len(reference.outputs[i]) for i in constrained) / 4


def test_logprobs_of_accepted_tokens_are_plain_decodings(tight: tuple[Any, Oracle], reference: Reference) -> None:
    llm, oracle = tight
    oracle.prepare(reference.texts)
    compared = 0
    outputs = run(llm, reference.prompts, reference.params)
    for ours, plain in zip(outputs, reference.logprobs, strict=True):
        assert (ours.logprobs is None) == (plain is None)
        for mine, theirs in zip(ours.logprobs or [], plain or [], strict=True):
            assert mine.keys() == theirs.keys()
            for token, logprob in mine.items():
                assert logprob.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
                assert logprob.rank == theirs[token].rank
                compared += 1
    assert compared > 100


def test_requests_may_run_into_the_end_of_the_context(engine: Callable[..., Any], reference: Reference) -> None:
    """Trees near max_model_len are cut from the end; what stays is a tree."""
    length = max(len(text) for text in reference.texts) - 8
    plain = engine(vllm_spec_plugins.engine_args("none"), max_model_len=length)
    fit = [i for i, prompt in enumerate(reference.prompts) if len(prompt) < length - 4]
    prompts, params = [reference.prompts[i] for i in fit], [sampling({"temperature": 0.0}, 0)] * len(fit)
    expected = [list(o.token_ids) for o in run(plain, prompts, params)]
    assert any(len(p) + len(o) >= length for p, o in zip(prompts, expected, strict=True))
    llm = engine(vllm_spec_plugins.engine_args("oracle"), max_model_len=length)
    oracle = Oracle.instances[-1]
    oracle.texts = [p + o for p, o in zip(prompts, expected, strict=True)]
    assert [list(o.token_ids) for o in run(llm, prompts, params)] == expected


def test_no_key_or_value_outside_a_requests_own_tokens_matters(tight: tuple[Any, Oracle], reference: Reference) -> None:
    """The whole K/V memory is filled with random numbers first; only what is written may be read."""
    llm, oracle = tight
    oracle.prepare(reference.texts)
    llm.reset_prefix_cache()
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    generator = torch.Generator().manual_seed(1)
    for layer in context.values():
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape, generator=generator) * 30)
    assert differing(llm, reference) == []


@pytest.mark.parametrize("settings", [{"block": 7}, {"block": 4, "mode": "blocks"}], ids=["sliding", "blocks"])
def test_jacobi_iteration_ends_at_plain_decodings_text(
    engine: Callable[..., Any], reference: Reference, settings: dict[str, Any]
) -> None:
    llm = engine(vllm_spec_plugins.engine_args("jacobi", adapt=False, **settings), **TIGHT)
    assert differing(llm, reference) == []
