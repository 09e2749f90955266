# SPDX-License-Identifier: Apache-2.0
"""Contrastive search on engines beside a plain implementation of it, token for token; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vllm_spec_plugins
from tests.engine.conftest import MODELS, TARGET
from tests.models.llama import Llama, load_checkpoint, rms_norm

TOKENS = 32
SHARP = {"alpha": 0.6, "k": 5}


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def lookahead(engine: Callable[..., Any], plain: Any) -> Any:
    """With the governor, which must leave candidates alone."""
    return engine(vllm_spec_plugins.engine_args("lookahead"), block_size=32)


# Prompts in chunks, blocks for two or three requests.
TIGHT = {
    "max_num_batched_tokens": 32,
    "block_size": 32,
    "num_gpu_blocks_override": 9,
    "max_model_len": 160,
}


@pytest.fixture(scope="module")
def tight(engine: Callable[..., Any], plain: Any) -> Any:
    plugin = vllm_spec_plugins.engine_args("specinfer", model=str(MODELS / "draft"), min_chance=0.0, adapt=False)
    return engine(plugin, **TIGHT)


@pytest.fixture(scope="module")
def target() -> Llama:
    return load_checkpoint(TARGET)


@torch.inference_mode()
def search(model: Llama, prompt: list[int], count: int, alpha: float, k: int) -> list[int]:
    """`count` tokens of contrastive search, everything computed anew for every token."""

    def states(texts: list[list[int]]) -> torch.Tensor:
        return rms_norm(model.hidden(torch.tensor(texts))[-1], model.norm)

    text = list(prompt)
    last = states([text])[0, -1]
    for _ in range(count):
        p, tokens = torch.softmax(model.head @ last, 0).topk(k)
        rows = states([[*text, token] for token in tokens.tolist()])
        best, choice = -float("inf"), 0
        for i in range(k):
            likeness = max(torch.cosine_similarity(rows[i, -1:], rows[i, :-1]).tolist())
            score = (1 - alpha) * float(p[i]) - alpha * likeness
            if score > best:
                best, choice = score, i
        text.append(int(tokens[choice]))
        last = rows[choice, -1]
    return text[len(prompt) :]


def params(contrastive: Any = None, **given: Any) -> Any:
    from vllm import SamplingParams

    extra = None if contrastive is None else {"contrastive": contrastive}
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "extra_args": extra, **given}
    )


def generate(llm: Any, prompts: list[list[int]], sampling: Any) -> list[list[int]]:
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def test_one_request_is_the_plain_implementations_text(
    lookahead: Any, plain: Any, target: Llama, prompts: list[list[int]]
) -> None:
    scheduler = lookahead.llm_engine.engine_core.engine_core.scheduler
    expected, before = search(target, prompts[0], TOKENS, **SHARP), scheduler.current_step
    assert generate(lookahead, prompts[:1], params(SHARP)) == [expected]
    assert scheduler.current_step - before == 1 + TOKENS  # one for the prompt: no candidates are declined
    assert generate(lookahead, prompts[:1], params(json.dumps(SHARP))) == [expected]
    assert expected != generate(plain, prompts[:1], params())[0], "the search never departs from greedy decoding"


def test_a_prompt_of_one_token_is_searched_from_its_first_token_on(lookahead: Any, target: Llama) -> None:
    assert generate(lookahead, [[77]], params(SHARP)) == [search(target, [77], TOKENS, **SHARP)]


def test_searched_requests_among_others_are_the_plain_implementations_and_the_others_plain_decodings(
    lookahead: Any, plain: Any, target: Llama, prompts: list[list[int]]
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    grammar = {"structured_outputs": StructuredOutputsParams(regex="(ab|cd|ef)+"), "temperature": 0.9, "seed": 6}
    asked = [SHARP, None, {}, None, {"k": 1}, {"alpha": 1.0, "k": 3}, None, {"alpha": 0.3, "k": 8}]
    others = [{}, {}, {}, {"temperature": 0.8, "seed": 3}, {}, {}, grammar, {}]
    sampling = [params(each, **rest) for each, rest in zip(asked, others, strict=True)]
    without = [params(None, **rest) for rest in others]
    decoded = generate(plain, prompts[:8], without)
    expected = [
        decoded[i] if each is None else search(target, prompts[i], TOKENS, **{"alpha": 0.6, "k": 4, **each})
        for i, each in enumerate(asked)
    ]
    for _ in range(2):  # the second time, the others' prompts come from the prefix cache
        assert generate(lookahead, prompts[:8], sampling) == expected


def test_a_step_without_room_for_all_candidates_emits_nothing_for_them(
    lookahead: Any, target: Llama, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests of 1 + 5 rows in steps of 14: the third gets one candidate verified, and waits."""
    scheduler, counts = lookahead.llm_engine.engine_core.engine_core.scheduler, set()
    schedule = scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        counts.update(map(len, step.scheduled_spec_decode_tokens.values()))
        return step

    monkeypatch.setattr(scheduler, "schedule", counted)
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 14)
    short = [prompt[:6] for prompt in prompts[:3]]
    expected = [search(target, prompt, 12, **SHARP) for prompt in short]
    assert generate(lookahead, short, params(SHARP, max_tokens=12)) == expected
    assert {1, 5} <= counts


def test_candidates_are_verified_whatever_the_governor_thinks_of_drafts(
    lookahead: Any, plain: Any, target: Llama, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_spec_plugins.engine.governor import Governor

    scheduler = lookahead.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(Governor, "asks", lambda self, batch: False)
    monkeypatch.setattr(Governor, "choose", lambda self, batch, drafts: set())
    expected = [search(target, prompts[1], TOKENS, **SHARP), *generate(plain, prompts[2:3], params())]
    before = scheduler.current_step
    assert generate(lookahead, prompts[1:3], [params(SHARP), params()]) == expected
    assert scheduler.current_step - before <= 2 + TOKENS


def test_alpha_0_is_greedy_decoding(lookahead: Any, plain: Any, prompts: list[list[int]]) -> None:
    assert generate(lookahead, prompts[:4], params({"alpha": 0, "k": 4})) == generate(plain, prompts[:4], params())


def test_what_a_request_leaves_is_nothing(lookahead: Any, prompts: list[list[int]]) -> None:
    runner = lookahead.llm_engine.model_executor.driver_worker.worker.model_runner
    generate(lookahead, prompts[:2], params(SHARP))
    generate(lookahead, prompts[:1], params(max_tokens=2))  # workers hear of an end with the next step
    assert runner.req_states.tree_state.searches.by_slot == {}


@pytest.mark.parametrize(
    ("contrastive", "given", "sentence"),
    [
        (True, {}, "True is not an object"),
        ("{alpha", {}, "'{alpha' is not JSON"),
        ("[" * 100_000, {}, "is not JSON"),
        ({"beta": 1}, {}, "unknown key beta; valid keys are alpha and k"),
        ({"alpha": 1.5}, {}, "alpha=1.5 is not a number from 0 to 1"),
        ({"alpha": "x"}, {}, "alpha='x' is not a number from 0 to 1"),
        ({"k": 0}, {}, "k=0 is not an integer of at least 1"),
        ({"k": 2.0}, {}, "k=2.0 is not an integer"),
        ({"k": 1000}, {}, "k=1000 is more than the "),
        ({}, {"temperature": 0.7}, "temperature=0.7 means nothing; set temperature to 0"),
        ({}, {"repetition_penalty": 1.2}, "repetition_penalty cannot be combined"),
        ({}, {"logit_bias": {3: 1.0}}, "logit_bias cannot be combined"),
        ({}, {"allowed_token_ids": [3]}, "allowed_token_ids cannot be combined"),
        ({}, {"min_tokens": 3}, "min_tokens cannot be combined"),
        ({}, {"logprobs": 1}, "logprobs cannot be combined"),
        ({}, {"prompt_logprobs": 1}, "prompt_logprobs cannot be combined"),
        ({}, {"bad_words": ["def"]}, "bad_words cannot be combined"),
        ({}, {"structured_outputs": "a+"}, "structured outputs cannot be combined"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_sentence(
    lookahead: Any, contrastive: Any, given: dict[str, Any], sentence: str
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    if regex := given.get("structured_outputs"):
        given = {"structured_outputs": StructuredOutputsParams(regex=regex)}
    with pytest.raises(VLLMValidationError) as refusal:
        generate(lookahead, [[5, 6, 7]], params(contrastive, **given))
    assert str(refusal.value).startswith("contrastive: ")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "sentence"),
    [
        ("scheduler_config", "async_scheduling", True, "start the server with --no-async-scheduling"),
        ("scheduler_config", "max_num_scheduled_tokens", 4, "--max-num-batched-tokens 4; use a k of at most 3"),
        ("scheduler_config", "long_prefill_token_threshold", 4, "--long-prefill-token-threshold 4; use a k of"),
        ("parallel_config", "enable_batch_sharded_sampling", True, "batch-sharded sampling is not supported"),
        ("model_config", "logits_processors", ["a.module:Processor"], "custom logits processors are not supported"),
        ("", "lora_config", object(), "LoRA adapters are not supported; start the server without --enable-lora"),
    ],
)
def test_an_engine_that_cannot_search_says_why(
    part: str, name: str, value: Any, sentence: str, lookahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    config = lookahead.llm_engine.vllm_config
    with monkeypatch.context() as patch:
        patch.setattr(getattr(config, part) if part else config, name, value)
        with pytest.raises(VLLMValidationError) as refusal:
            generate(lookahead, [[5, 6, 7]], params({"k": 4}))
    assert str(refusal.value).startswith("contrastive: ")
    assert sentence in str(refusal.value)


# From here on another engine: vLLM's log takes those of one process to have trees of one depth.


def test_a_draft_model_chunked_prompts_and_preemption_change_nothing(
    tight: Any, plain: Any, target: Llama, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, preempted = tight.llm_engine.engine_core.engine_core.scheduler, []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.sampling_params.extra_args is not None and request.num_output_tokens > 0)
        return original(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    decoded = generate(plain, prompts[:5], params())
    expected = [search(target, prompts[i], TOKENS, **SHARP) if i % 4 else decoded[i] for i in range(5)]
    assert generate(tight, prompts[:5], [params(SHARP if i % 4 else None) for i in range(5)]) == expected
    assert any(preempted), "no searched request was preempted within its answer: the test is too easy"


def test_an_answer_ends_k_tokens_before_the_context_does(tight: Any, target: Llama, prompts: list[list[int]]) -> None:
    prompt = (prompts[0] * 8)[:120]
    count = TIGHT["max_model_len"] - SHARP["k"] - len(prompt)
    result = tight.generate({"prompt_token_ids": prompt}, params(SHARP, max_tokens=None), use_tqdm=False)[0].outputs[0]
    assert list(result.token_ids) == search(target, prompt, count, **SHARP)
    assert result.finish_reason == "length"


def test_a_prompt_without_room_for_candidates_is_refused(tight: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match="a prompt of 156 tokens and 4 candidates leave no token of the context of 160"
    ):
        generate(tight, [[5] * 156], params({}))


def test_an_engine_that_verifies_nothing_refuses_it(plain: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match="contrastive: --plugin none verifies no candidates; start the server with"
    ):
        generate(plain, [[5, 6, 7]], params({}))
