# SPDX-License-Identifier: Apache-2.0
"""Cascades on engines: exact at the exact end and for `full` requests, lossy and counted elsewhere, escalated at any token."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.decoding import SAMPLINGS, generate
from vllm_spec_plugins.engine import cascade as engine_cascade

STAGES = {
    "self-draft": "self-draft:exit_layer=4,adapt=false",
    "specinfer": f"specinfer:model={MODELS / 'draft'},adapt=false",
}
BOLD = {"confidence": 0.3, "difference": 0.5, "top": 0.9}


def start(engine: Callable[..., Any], stage: str, cascade: str) -> Any:
    """An engine with what was logged at its start, and what it counts while it runs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    llm = engine(vllm_spec_plugins.engine_args(STAGES[stage], cascade))
    logging.getLogger("vllm").removeHandler(handler)
    llm.logged, llm.lossy = lines, 0
    speculator = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator
    take = speculator._take_counts

    def taken() -> Any:
        (found,) = take()
        llm.lossy += int(found)
        return [found]

    speculator._take_counts = taken
    return llm


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def difference(engine: Callable[..., Any], plain: Any) -> Any:
    return start(engine, "self-draft", "cascade:rule=difference:0.2,route=cheap")


@pytest.fixture(scope="module")
def confidence(engine: Callable[..., Any], plain: Any) -> Any:
    return start(engine, "specinfer", "cascade:rule=confidence:0.5,route=cheap")


def asked(route: str | None = None, threshold: float | None = None, **others: Any) -> dict[str, Any]:
    """A greedy request of the cascade."""
    given = {key: value for key, value in (("route", route), ("threshold", threshold)) if value is not None}
    return {"temperature": 0.0, "extra_args": {"cascade": given}, **others}


def lossy(llm: Any) -> int:
    """Tokens counted since last asked."""
    found, llm.lossy = llm.lossy, 0
    return int(found)


def emitted(llm: Any, text: list[int]) -> list[int]:
    """All tokens of the request that has just ended with `text`: its last stretch may go beyond its end."""
    states = llm.llm_engine.model_executor.driver_worker.worker.model_runner.req_states
    for row, length in zip(states.all_token_ids.gpu.tolist(), states.total_len.gpu.tolist(), strict=True):
        if length >= len(text) and row[: len(text)] == text:
            return row[:length]
    raise AssertionError("no such request")


def disagreement(plain: Any, prompts: list[list[int]], texts: list[list[int]]) -> list[int]:
    """Tokens of each text that are not the full model's likeliest behind what stands before them."""
    from vllm import SamplingParams

    whole = [{"prompt_token_ids": prompt + text} for prompt, text in zip(prompts, texts, strict=True)]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    found = plain.generate(whole, params, use_tqdm=False)
    return [
        sum(
            result.prompt_logprobs[len(prompt) + i][token].rank > 1  # type: ignore[index]
            for i, token in enumerate(text)
        )
        for prompt, text, result in zip(prompts, texts, found, strict=True)
    ]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_full_requests_are_plain_decodings_beside_cheap_ones(
    name: str, plain: Any, difference: Any, prompts: list[list[int]]
) -> None:
    sampling = [SAMPLINGS[name](i) for i in range(8)]
    expected, _ = generate(plain, prompts[:8], sampling)
    full = {"extra_args": {"cascade": {"route": "full"}}}
    found, _ = generate(
        difference, prompts[:8], [{**each, **full} if i % 2 else each for i, each in enumerate(sampling)]
    )
    assert found[1::2] == expected[1::2]
    assert found[::2] != expected[::2]


@pytest.mark.parametrize("exact", [{"threshold": -1.0}, {"route": "full"}])
def test_at_its_exact_end_the_difference_rule_is_plain_decoding(
    exact: dict[str, Any], plain: Any, difference: Any, prompts: list[list[int]]
) -> None:
    sampling = [{**SAMPLINGS["mixed"](i), "extra_args": {"cascade": exact}} for i in range(8)]
    expected, _ = generate(plain, prompts[:8], [SAMPLINGS["mixed"](i) for i in range(8)])
    lossy(difference)
    assert generate(difference, prompts[:8], sampling)[0] == expected
    assert lossy(difference) == 0


def test_at_its_exact_end_the_confidence_rule_is_plain_decoding(
    plain: Any, confidence: Any, prompts: list[list[int]]
) -> None:
    sampling = [{**SAMPLINGS["mixed"](i), "extra_args": {"cascade": {"threshold": 1.5}}} for i in range(8)]
    expected, _ = generate(plain, prompts[:8], [SAMPLINGS["mixed"](i) for i in range(8)])
    assert generate(confidence, prompts[:8], sampling)[0] == expected
    assert generate(confidence, prompts[:8], [SAMPLINGS["mixed"](i) for i in range(8)])[0] != expected


def test_top_0_is_greedy_decoding_and_what_it_keeps_beyond_is_lossy(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    llm = start(engine, "specinfer", "cascade:rule=top:0,route=cheap")
    expected, _ = generate(plain, prompts[:6], [{"temperature": 0.0}] * 6)
    assert generate(llm, prompts[:6], [{"temperature": 0.0}] * 6)[0] == expected
    assert lossy(llm) == 0
    for prompt, text in zip(prompts[:3], expected, strict=False):
        kept, _ = generate(llm, [prompt], [asked(threshold=0.8)])
        assert kept != [text]
        assert lossy(llm) == sum(disagreement(plain, [prompt], [emitted(llm, prompt + kept[0])[len(prompt) :]])) > 0


def test_lossy_tokens_are_counted_and_said_and_bring_tokens_per_step(
    plain: Any, confidence: Any, prompts: list[list[int]]
) -> None:
    """What is counted is what the full model would not have chosen, read off the text itself."""
    lossy(confidence)
    texts, slow, fast = [], 0.0, 0.0
    for prompt in prompts[:5]:
        text, speed = generate(confidence, [prompt], [asked(threshold=0.2)])
        texts.append(emitted(confidence, prompt + text[0])[len(prompt) :])
        fast += speed
        slow += generate(confidence, [prompt], [asked("full")])[1]
    assert lossy(confidence) == sum(disagreement(plain, prompts[:5], texts)) > 0
    print(fast / 5, slow / 5)
    assert fast > 1.2 * slow
    sentences = [line for line in confidence.logged if "lossy" in line]
    assert sentences == [
        "--plugin cascade: rule=confidence:0.5 is lossy: text is not plain decoding's, of greedy requests neither"
    ]


def test_an_escalated_request_goes_on_as_plain_decoding_does_from_its_text(
    plain: Any, difference: Any, confidence: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 20 tokens of cheap stretches, in the same request: the full model's K/V behind them is complete."""
    for llm in (difference, confidence):
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        routes, escalation = runner.req_states.tree_state.routes, Escalation(runner, len(prompts[3]), 20)
        with monkeypatch.context() as patch:
            patch.setattr(routes, "thresholds", escalation)
            bold = {"difference": 0.5, "confidence": 0.2}[routes.rule.name]
            (text,), _ = generate(llm, [prompts[3]], [asked(threshold=bold)], max_tokens=60)
        cheap = escalation.at
        assert 20 <= cheap < 60
        assert text != generate(plain, [prompts[3]], [{"temperature": 0.0}], max_tokens=60)[0][0]
        (rest,), _ = generate(plain, [prompts[3] + text[:cheap]], [{"temperature": 0.0}], max_tokens=60 - cheap)
        assert text[cheap:] == rest


class Escalation:
    """In the place of `Routes.thresholds`: one request's, from a number of tokens on those of route `full`."""

    def __init__(self, runner: Any, prompt_len: int, tokens: int) -> None:
        self.thresholds = runner.req_states.tree_state.routes.thresholds
        self.lengths, self.prompt_len, self.tokens, self.at = runner.req_states.total_len.gpu, prompt_len, tokens, 0

    def __call__(self, slots: Any) -> Any:
        done = self.lengths[slots] - self.prompt_len
        if not self.at and int(done[0]) >= self.tokens:
            self.at = int(done[0])
        return self.thresholds(slots).masked_fill(done >= self.tokens, float("inf"))


def test_an_auto_request_is_as_its_own_agreement_says_and_repeats_itself(
    plain: Any, difference: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = difference.llm_engine.model_executor.driver_worker.worker.model_runner.req_states.tree_state.routes
    auto = [asked("auto", 0.5)] * 6
    first = generate(difference, prompts[:6], auto)[0]
    assert generate(difference, prompts[:6], auto)[0] == first
    expected, _ = generate(plain, prompts[:6], [{"temperature": 0.0}] * 6)
    cheap, _ = generate(difference, prompts[:6], [asked("cheap", 0.5)] * 6)
    monkeypatch.setattr(routes, "least", 1.01)  # nobody is easy
    assert generate(difference, prompts[:6], auto)[0] == expected
    monkeypatch.setattr(routes, "least", 0.0)
    assert generate(difference, prompts[:6], auto)[0] == cheap
    assert first != expected


def test_exit_policies_decide_which_answers_stand(
    engine: Callable[..., Any], plain: Any, prompts: list[list[int]]
) -> None:
    llm = start(engine, "self-draft", "cascade:rule=exit:entropy:1.0,route=cheap")
    expected, _ = generate(plain, prompts[:6], [{"temperature": 0.0}] * 6)
    wrong = []
    for bound in (0.0, 2.0, 4.0):
        texts, _ = generate(llm, prompts[:6], [asked(threshold=bound)] * 6)
        wrong.append(sum(disagreement(plain, prompts[:6], texts)))
        assert (texts == expected) is (bound == 0.0)
    assert 0 == wrong[0] < wrong[1] < wrong[2]


def test_a_grammar_is_kept_whatever_the_cheap_stage_says(confidence: Any, prompts: list[list[int]]) -> None:
    from tests.engine.test_requests import SCHEMA

    bold = {"extra_args": {"cascade": {"threshold": 0.0}}, "json": SCHEMA, "ignore_eos": False}
    from transformers import AutoTokenizer

    from tests.engine.conftest import TARGET

    texts, _ = generate(confidence, prompts[:4], [{**bold, "temperature": i / 4, "seed": i} for i in range(4)], 120)
    tokenizer, done = AutoTokenizer.from_pretrained(TARGET), 0
    for text in texts:
        if len(text) < 120:
            json.loads(tokenizer.decode(text, skip_special_tokens=True))
            done += 1
    assert done > 0


def test_cheap_stretches_leave_room_in_steps_that_serve_a_full_request(
    confidence: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, steps = confidence.llm_engine.engine_core.engine_core.scheduler, []
    schedule = scheduler.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        full = {r.request_id for r in scheduler.running if r.sampling_params.extra_args["cascade"]["route"] == "full"}
        drafts = step.scheduled_spec_decode_tokens
        steps.append((bool(full), sum(len(tokens) for request, tokens in drafts.items() if request not in full)))
        return step

    engine_cascade.make_room(scheduler, None)  # type: ignore[arg-type]  # which reads the settings
    from dataclasses import replace

    monkeypatch.setattr(scheduler, "_spec_cascade", replace(scheduler._spec_cascade, cheap_nodes=7))
    monkeypatch.setattr(scheduler, "schedule", recorded)
    sampling = [asked("full", max_tokens=16), *[asked("cheap", 0.0)] * 3]
    generate(confidence, prompts[:4], sampling)
    beside = [nodes for full, nodes in steps if full]
    alone = [nodes for full, nodes in steps if not full]
    assert max(beside) == 6  # two nodes for each of three
    assert max(alone) > 7


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (True, "True is not an object"),
        ("{route", "'{route' is not JSON"),
        ({"rout": "full"}, "unknown key rout; valid keys are route and threshold"),
        ({"route": "fast"}, "route='fast' is not valid; valid are auto, cheap, full"),
        ({"route": ["full"]}, "is not valid; valid are auto, cheap, full"),
        ({"threshold": "x"}, "threshold='x' is not a number"),
        ({"threshold": True}, "threshold=True is not a number"),
        ({"threshold": 2}, "threshold=2 is out of range for difference; valid are -1 to 1"),
        ({"threshold": 1e30}, "threshold=1e+30 is out of range"),
        ({"route": "full", "threshold": 0.1}, "threshold=0.1 means nothing with route=full"),
    ],
)
def test_what_a_request_may_not_ask_is_refused_in_one_sentence(difference: Any, given: Any, sentence: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as refusal:
        generate(difference, [[5, 6, 7]], [{"temperature": 0.0, "extra_args": {"cascade": given}}])
    assert str(refusal.value).startswith("cascade: ") and sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_json_text_asks_the_same(difference: Any, prompts: list[list[int]]) -> None:
    text = {"temperature": 0.0, "extra_args": {"cascade": json.dumps({"threshold": 0.5})}}
    assert (
        generate(difference, prompts[:2], [text] * 2)[0]
        == generate(difference, prompts[:2], [asked(threshold=0.5)] * 2)[0]
    )


def test_an_engine_without_a_cascade_says_so(plain: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match="this engine serves no cascade; start the server with --plugin cascade"
    ):
        generate(plain, [[5, 6, 7]], [asked("full")])
