# SPDX-License-Identifier: Apache-2.0
"""Lookahead and Medusa on engines beside plain decoding: grammars, turns, several answers, streams, metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine import compare
from tests.engine.conftest import MODELS
from vllm_spec_plugins import registry

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 5},
        "size": {"type": "integer"},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def lookahead(engine: Callable[..., Any], plain: Any) -> Any:
    return engine(vllm_spec_plugins.engine_args("lookahead", adapt=False), block_size=32)


@pytest.fixture(scope="module")
def medusa(engine: Callable[..., Any], plain: Any) -> Any:
    plugin = vllm_spec_plugins.engine_args("medusa", model=str(MODELS / "medusa"), min_chance=0.0, adapt=False)
    return engine(plugin, block_size=32)


@pytest.fixture(params=["lookahead", "medusa"])
def speculating(request: pytest.FixtureRequest) -> Any:
    """Each in turn; every draft is verified, whatever it costs here."""
    return request.getfixturevalue(request.param)


def tokens(llm: Any, prompts: list[list[int]], params: Any) -> list[list[int]]:
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.token_ids) for result in results for output in result.outputs]


def counters(llm: Any) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def test_grammar_constrained_requests_among_others_equal_plain_decodings(
    plain: Any, lookahead: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(i: int) -> Any:
        constrained = StructuredOutputsParams(json=SCHEMA) if i % 2 == 0 else None
        return SamplingParams(
            max_tokens=64, temperature=0.0 if i % 4 < 2 else 0.7, seed=i, structured_outputs=constrained
        )

    every = [params(i) for i in range(12)]
    expected = tokens(plain, prompts[:12], every)
    assert tokens(lookahead, prompts[:12], every) == expected
    tokenizer = plain.get_tokenizer()
    complete = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected[::2] if len(ids) < 64]
    for text in complete:
        assert set(json.loads(text)) == {"name", "tags", "size"}


def test_several_seeded_answers_per_prompt_equal_plain_decodings(
    plain: Any, speculating: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(n=3, max_tokens=32, temperature=0.8, top_p=0.9, seed=11)
    assert tokens(speculating, prompts[:4], params) == tokens(plain, prompts[:4], params)


def test_a_second_turn_over_generated_text_equals_plain_decodings_warm_and_cold(
    plain: Any, speculating: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=72, temperature=0.0, ignore_eos=True)
    texts = [prompt + text for prompt, text in zip(prompts, tokens(plain, prompts[:4], params), strict=False)]
    turns = [text + prompts[5][:9] for text in texts]
    expected = tokens(plain, turns, params)
    speculating.reset_prefix_cache()
    assert tokens(speculating, prompts[:4], params) == [text[-72:] for text in texts]
    requests = [{"prompt_token_ids": turn} for turn in turns]
    warm = speculating.generate(requests, params, use_tqdm=False)
    assert [list(result.outputs[0].token_ids) for result in warm] == expected
    for result, prompt in zip(warm, prompts, strict=False):
        assert result.num_cached_tokens > len(prompt), "no block of generated text came from the cache"
    speculating.reset_prefix_cache()
    assert tokens(speculating, turns, params) == expected


def test_stop_strings_end_the_text_where_they_end_plain_decodings(
    plain: Any, speculating: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=48,
            temperature=i % 2 * 0.8,
            seed=i,
            stop=["(self", "return", ", "],
            include_stop_str_in_output=i % 4 < 2,
        )
        for i in range(8)
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts[:8]]
    theirs, ours = (
        [
            (list(output.token_ids), output.text, output.finish_reason, output.stop_reason)
            for result in llm.generate(requests, params, use_tqdm=False)
            for output in result.outputs
        ]
        for llm in (plain, speculating)
    )
    assert ours == theirs
    assert sum(reason == "stop" for _, _, reason, _ in theirs) >= 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_stream_carries_plain_decodings_text_several_tokens_at_a_time(
    plain: Any, speculating: Any, prompts: list[list[int]], temperature: float
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    whole = [SamplingParams(max_tokens=64, temperature=temperature, seed=i) for i in range(4)]
    results = plain.generate([{"prompt_token_ids": p} for p in prompts[:4]], whole, use_tqdm=False)
    expected = {f"stream-{i}": (list(r.outputs[0].token_ids), r.outputs[0].text) for i, r in enumerate(results)}
    streaming = speculating.llm_engine
    for i, params in enumerate(whole):
        params = params.clone()
        params.output_kind = RequestOutputKind.DELTA
        streaming.add_request(f"stream-{i}", {"prompt_token_ids": prompts[i]}, params)
    found: dict[str, tuple[list[int], str]] = {name: ([], "") for name in expected}
    largest = 0
    while streaming.has_unfinished_requests():
        for piece in streaming.step():
            ids, text = found[piece.request_id]
            found[piece.request_id] = ids + list(piece.outputs[0].token_ids), text + piece.outputs[0].text
            largest = max(largest, len(piece.outputs[0].token_ids))
    assert found == expected
    assert largest > 1


def test_prompt_logprobs_equal_plain_decodings(plain: Any, lookahead: Any, prompts: list[list[int]]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=2)
    request = [{"prompt_token_ids": prompt} for prompt in prompts[:3]]
    theirs = plain.generate(request, params, use_tqdm=False)
    ours = lookahead.generate(request, params, use_tqdm=False)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.outputs[0].token_ids == other.outputs[0].token_ids
        for a, b in zip(mine.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a.keys() == b.keys()
            assert all(a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4) for token in a)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_of_accepted_tokens_equal_plain_decodings(
    temperature: float, engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    llm = engine(vllm_spec_plugins.engine_args("lookahead", guesses=4, min_chance=0.0, adapt=False))
    sampling = [{"temperature": temperature, "seed": i, "logprobs": 5} for i in range(6)]
    limits = {"max_tokens": 48, "ignore_eos": True}
    expected = compare.generate(plain, prompts[:6], sampling, **limits)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.current_step
    for found, other in zip(compare.generate(llm, prompts[:6], sampling, **limits), expected, strict=True):
        compare.assert_same_logprobs(found, other)
    if temperature == 0.0:
        assert scheduler.current_step - before < 48  # drafts were accepted


def test_mean_acceptance_length_is_tokens_per_target_step(engine: Callable[..., Any], prompts: list[list[int]]) -> None:
    """Steps without drafts count: 1 + accepted / drafts is what a request gets from one pass of the model."""
    from vllm import SamplingParams

    llm = engine(vllm_spec_plugins.engine_args("lookahead"))
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before, steps = counters(llm), scheduler.current_step
    out = tokens(llm, prompts[:1], SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True))[0]
    after, steps = counters(llm), scheduler.current_step - steps
    drafts, accepted = (
        after[name] - before.get(name, 0.0)
        for name in ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    )
    decode_steps = steps - 1  # the first step computes the prompt and gives one token
    assert drafts == decode_steps
    # The last path may be cut by max_tokens: what it accepted beyond is counted, and not in the output.
    settings = registry.resolve("lookahead")
    _, deepest = registry.method_of(settings).shape(settings)
    assert 0 <= accepted + drafts + 1 - len(out) <= deepest


def test_the_workers_are_asked_once_per_step(
    plain: Any, lookahead: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar's bitmask is made during the forward pass, so its steps ask for the tokens apart; never for drafts."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def asked(llm: Any, params: Any) -> dict[str, int]:
        executor, calls = llm.llm_engine.model_executor, dict.fromkeys(("execute_model", "sample_tokens"), 0)
        original = executor.collective_rpc

        def collective_rpc(method: str, *args: Any, **kwargs: Any) -> Any:
            if (
                method != "execute_model" or kwargs["args"][0].total_num_scheduled_tokens
            ):  # not one that waits for a grammar
                calls[method] = calls.get(method, 0) + 1
            return original(method, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(executor, "collective_rpc", collective_rpc)
            tokens(llm, prompts[:3], params)
        return calls

    schema = StructuredOutputsParams(json=SCHEMA)
    for llm in (plain, lookahead):
        calls = asked(llm, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
        assert calls.keys() == {"execute_model", "sample_tokens"}
        assert calls["execute_model"] >= 2 and calls["sample_tokens"] == 0
        calls = asked(llm, SamplingParams(max_tokens=24, temperature=0.0, structured_outputs=schema))
        assert calls.keys() == {"execute_model", "sample_tokens"}
        assert calls["sample_tokens"] > calls["execute_model"] / 2


def test_an_engine_without_a_plugin_in_the_same_process_is_vllms_own(
    engine: Callable[..., Any], plain: Any, lookahead: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    llm = engine(None)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    assert isinstance(worker.model_runner, CPUModelRunner)
    assert not llm.llm_engine.vllm_config.use_v2_model_runner
    params = SamplingParams(max_tokens=24, temperature=0.0)
    assert tokens(llm, prompts[:4], params) == tokens(plain, prompts[:4], params)
