# SPDX-License-Identifier: Apache-2.0
"""The fast lane decodes as vLLM's own CPU runner where that is deterministic, and as the real kernels where it samples."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.engine.cpu.conftest import Request, decode, job, word_token

TOKENS = 20
# A token that a bias makes certain and a bad word forbids: whatever the model, both show.
FAVOURITE, WORD = word_token()
# Whatever changes greedy output, or comes with it.
GREEDY: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": -0.3, "presence_penalty": 0.4},
    "bias": {"logit_bias": {FAVOURITE: 100.0, FAVOURITE + 1: -100.0}},
    "bad_words": {"logit_bias": {FAVOURITE: 100.0}, "bad_words": [WORD]},
    "allowed": {"allowed_token_ids": list(range(200, 900))},
    "min_tokens": {"logit_bias": {FAVOURITE: 100.0}, "stop_token_ids": [FAVOURITE], "min_tokens": 9},
    "logprobs": {"logprobs": 4},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "choice": {"grammar": {"choice": ["alpha", "beta", "gamma delta"]}},
    "regex": {"grammar": {"regex": "[a-f]{4}-[0-9]{3}"}},
}
# Whatever changes how a token is drawn.
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.85},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.0},
]


def greedy_batches(prompts: list[list[int]]) -> list[list[Request]]:
    plain = [{"prompt": prompt, "params": {"max_tokens": TOKENS, "temperature": 0.0}} for prompt in prompts]
    features = [
        {"prompt": prompts[i % len(prompts)], "params": {"max_tokens": TOKENS, "temperature": 0.0, **params}}
        for i, params in enumerate(GREEDY.values())
    ]
    return [plain, features]


def sampled_batch(prompts: list[list[int]], tokens: int, offset: int = 0) -> list[Request]:
    return [
        {"prompt": prompts[i], "params": {"max_tokens": tokens, "seed": 10 * i + offset - 35, **params}}
        for i, params in enumerate(SAMPLED)
    ]


def few_tokens(prompts: list[list[int]]) -> list[Request]:
    """As many as the interpreter has time for."""
    return sampled_batch(prompts, tokens=5, offset=3)


# Prompts are prefilled in chunks of at most 48 tokens, beside decoding requests.
CHUNKED = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def v1(prompts: list[list[int]]) -> dict[str, Any]:
    return decode("v1", v1=job(greedy_batches(prompts), **CHUNKED))["v1"]


# vLLM refuses logit bias together with drafts.
UNBIASED = [
    i for i, (name, params) in enumerate(GREEDY.items()) if "logit_bias" not in params and name != "prompt_logprobs"
]


@pytest.fixture(scope="module")
def engines(prompts: list[list[int]]) -> dict[str, Any]:
    """The fast lane as it is, with asynchronous scheduling, and with vLLM's own drafts."""
    alike = [
        {"prompt": prompts[0], "params": {"max_tokens": TOKENS, **params}}
        for params in (
            {"temperature": 0.9, "seed": 1},
            {"temperature": 0.9, "seed": 1},
            {"temperature": 0.9, "seed": 2},
            {"temperature": 0.9},
            {"temperature": 0.9},
            {"temperature": 0.9, "top_k": 1},
            {"temperature": 0.9, "min_p": 1.0},
            {"temperature": 0.9, "top_p": 1e-6},
        )
    ]
    plain, features = greedy_batches(prompts)
    sampled = sampled_batch(prompts, TOKENS)
    drafting = {"method": "ngram_gpu", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return decode(
        "fast",
        fast=job([plain, features, sampled, sampled, alike, few_tokens(prompts)], **CHUNKED),
        ahead=job([plain, features, sampled], async_scheduling=True, **CHUNKED),
        drafting=job([plain, [features[i] for i in UNBIASED]], speculative_config=drafting, **CHUNKED),
    )


@pytest.fixture(scope="module")
def fast(engines: dict[str, Any]) -> dict[str, Any]:
    return engines["fast"]


def tokens(batch: list[dict[str, Any]]) -> list[list[int]]:
    return [output["tokens"] for output in batch]


def test_each_lane_runs_on_its_runner(v1: dict[str, Any], fast: dict[str, Any]) -> None:
    assert v1["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert fast["runner"] == "vllm.v1.worker.cpu.model_runner"


def test_greedy_output_is_that_of_the_other_runner(v1: dict[str, Any], fast: dict[str, Any]) -> None:
    assert tokens(fast["batches"][0]) == tokens(v1["batches"][0])


@pytest.mark.parametrize("feature", GREEDY)
def test_greedy_output_under_a_feature_is_that_of_the_other_runner(
    v1: dict[str, Any], fast: dict[str, Any], feature: str
) -> None:
    place = list(GREEDY).index(feature)
    ours, theirs = fast["batches"][1][place], v1["batches"][1][place]
    assert ours["tokens"] == theirs["tokens"]
    assert (ours["text"], ours["finish"]) == (theirs["text"], theirs["finish"])
    for kind in ("logprobs", "prompt_logprobs"):
        assert (ours[kind] is None) == (theirs[kind] is None)
        for at, expected in zip(ours[kind] or [], theirs[kind] or [], strict=True):
            assert (at is None) == (expected is None)
            assert set(at or {}) == set(expected or {})
            for token, (logprob, rank) in (at or {}).items():
                assert logprob == pytest.approx(expected[token][0], abs=1e-4)
                assert rank == expected[token][1]


def test_features_change_what_they_should(fast: dict[str, Any]) -> None:
    plain = tokens(fast["batches"][0])
    found = dict(zip(GREEDY, fast["batches"][1], strict=True))
    unchanged = {name for i, name in enumerate(GREEDY) if found[name]["tokens"] == plain[i % len(plain)]}
    assert unchanged <= {"logprobs", "prompt_logprobs", "bad_words"}, "a feature without effect shows nothing"
    assert FAVOURITE not in found["bad_words"]["tokens"]
    assert set(found["allowed"]["tokens"]) <= set(range(200, 900))
    assert found["bias"]["tokens"] == [FAVOURITE] * TOKENS
    assert found["min_tokens"]["tokens"].index(FAVOURITE) == len(found["min_tokens"]["tokens"]) - 1 == 9
    assert found["min_tokens"]["finish"] == "stop"
    assert found["choice"]["text"] in GREEDY["choice"]["grammar"]["choice"]
    assert re.fullmatch(GREEDY["regex"]["grammar"]["regex"], found["regex"]["text"])


def test_a_seed_repeats_its_draws_and_nothing_else_does(fast: dict[str, Any]) -> None:
    first, again = fast["batches"][2:4]
    assert tokens(first) == tokens(again)
    same, twin, other, free, loose, *_ = tokens(fast["batches"][4])
    assert same == twin
    assert len({tuple(draw) for draw in (same, other, free, loose)}) == 4


@pytest.mark.parametrize("restricted", [5, 6, 7], ids=["top_k=1", "min_p=1", "top_p=0"])
def test_sampling_that_leaves_one_token_is_greedy(fast: dict[str, Any], restricted: int) -> None:
    assert tokens(fast["batches"][4])[restricted] == tokens(fast["batches"][0])[0]


def test_seeded_output_is_that_of_the_real_kernels(prompts: list[list[int]], fast: dict[str, Any]) -> None:
    (interpreted,) = decode("interpreted", real=job([few_tokens(prompts)]))["real"]["batches"]
    ours = fast["batches"][5]
    assert tokens(ours) == tokens(interpreted)
    for at, expected in zip(ours[6]["logprobs"], interpreted[6]["logprobs"], strict=True):
        assert set(at) == set(expected)


def test_asynchronous_scheduling_changes_no_token(engines: dict[str, Any], fast: dict[str, Any]) -> None:
    ahead = engines["ahead"]
    assert ahead["async"] is True
    assert fast["async"] is False
    for ours, expected in zip(ahead["batches"], fast["batches"], strict=False):
        assert tokens(ours) == tokens(expected)
    assert ahead["batches"][1][list(GREEDY).index("logprobs")]["logprobs"]


def test_vllms_own_ngram_drafts_change_no_greedy_token(engines: dict[str, Any], fast: dict[str, Any]) -> None:
    plain, features = engines["drafting"]["batches"]
    assert tokens(plain) == tokens(fast["batches"][0])
    assert tokens(features) == [fast["batches"][1][i]["tokens"] for i in UNBIASED]
