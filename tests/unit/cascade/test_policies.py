# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.cascade.config import CascadeConfigError, ClassifierSettings, ScorerSettings, VoteSettings
from vllm_spec_plugins.cascade.logistic import BITS, FIGURES
from vllm_spec_plugins.cascade.policies import Confidence, SelfVerification, Verdict, Vote, build
from vllm_spec_plugins.cascade.request import Body, Kind, Reply, Request, RequestError


def request(kind: Kind = "completions", **body: Any) -> Request:
    what: Body = (
        {"prompt": "2 + 2 ="} if kind == "completions" else {"messages": [{"role": "user", "content": "2 + 2 ="}]}
    )
    return Request("r", kind, {"model": "cascade", **what, **body}, "t", 0.5)


def reply(*texts: str, logprobs: Sequence[Sequence[float]] = ()) -> Reply:
    held = [{"token_logprobs": list(each)} for each in logprobs] or [None] * len(texts)
    choices = [{"index": i, "text": text, "finish_reason": "stop", "logprobs": held[i]} for i, text in enumerate(texts)]
    return Reply.parse("completions", {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


class Asked:
    """Answers what a policy asks further, and remembers it."""

    def __init__(self, answer: Any = None) -> None:
        self.bodies: list[Body] = []
        self.pairs: list[tuple[str, str]] = []
        self.answer = answer

    async def stage(self, body: Body) -> Reply:
        self.bodies.append(body)
        return self.answer

    async def scorer(self, question: str, answer: str) -> float:
        self.pairs.append((question, answer))
        return float(self.answer[answer])


def judge(
    policy: Any, replies: Sequence[Reply], asking: Any = None, kind: Kind = "completions", **body: Any
) -> Verdict:
    return asyncio.run(policy.judge(request(kind, **body), replies, asking or Asked()))


def test_confidence_is_the_mean_the_least_or_a_quantile_of_the_tokens_probabilities() -> None:
    logprobs = [math.log(p) for p in (0.9, 0.5, 0.1)]
    answer = [reply("x", logprobs=[logprobs])]
    assert judge(Confidence("mean"), answer).score == pytest.approx(0.5)
    assert judge(Confidence("min"), answer).score == pytest.approx(0.1)
    assert judge(Confidence("quantile", 0.5), answer).score == pytest.approx(0.5)
    assert judge(Confidence("quantile", 0.25), answer).score == pytest.approx(0.3)


def test_of_several_choices_the_worst_counts_and_an_answer_without_tokens_has_no_confidence() -> None:
    assert judge(Confidence(), [reply("x", "y", logprobs=[[-0.1], [-3.0]])]).score == pytest.approx(math.exp(-3))
    assert judge(Confidence(), [reply("", logprobs=[[]])]).score == 0.0


VOTE = Vote(4, 0.7, ("", "Think."))


def test_a_vote_samples_both_styles_in_turn() -> None:
    asks = VOTE.asks(request(temperature=0, seed=5))
    assert [ask["prompt"] for ask in asks] == ["2 + 2 =", "Think.\n\n2 + 2 ="] * 2
    assert [ask["seed"] for ask in asks] == [5, 6, 7, 8]
    assert {ask["temperature"] for ask in asks} == {0.7}
    # Greedy requests are deterministic ones, and stay so; others keep their chance.
    assert [ask["seed"] for ask in VOTE.asks(request(temperature=0))] == [0, 1, 2, 3]
    assert not any("seed" in ask for ask in VOTE.asks(request(temperature=1)))


def test_the_score_of_a_vote_is_the_majoritys_share_and_its_answer_the_first_of_the_majority() -> None:
    assert judge(VOTE, [reply(text) for text in ("5", "4.", " 4 ", "4")]) == Verdict(0.75, 1)
    assert judge(VOTE, [reply(text) for text in ("b", "a", "b", "a")]) == Verdict(0.5, 0)


def test_a_pattern_says_what_samples_are_compared_by_and_those_without_it_agree_with_none() -> None:
    settings = VoteSettings(kind="vote", answer_pattern=r"answer: (\w+)")
    policy = build(settings, ["a", "b"])
    texts = ["answer: 1 no, answer: 4", "nothing", "nothing", "so the answer: 4"]
    assert judge(policy, [reply(text) for text in texts]) == Verdict(0.5, 0)
    assert judge(policy, [reply("nothing")] * 4) == Verdict(0.0, 0)


def test_a_vote_refuses_requests_for_several_answers() -> None:
    with pytest.raises(RequestError, match="n=2"):
        VOTE.check(request(n=2))


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_self_verification_reads_the_probability_of_yes(kind: Kind) -> None:
    chances = {"Yes": 0.4, " yes": 0.2, "no": 0.1, "No.": 0.1, "maybe": 0.2}
    top = {token: math.log(chance) for token, chance in chances.items()}
    if kind == "chat":
        held: Any = {"content": [{"logprob": -1, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}]}
    else:
        held = {"token_logprobs": [-1.0], "top_logprobs": [top]}
    choice = {"text": "Yes", "message": {"content": "Yes"}, "finish_reason": "length", "logprobs": held}
    asked = Asked(Reply.parse(kind, {"choices": [choice], "usage": {"prompt_tokens": 1}}))
    policy = SelfVerification("{question}|{answer}? {x}", 100)
    assert judge(policy, [reply("four {answer}")], asked, kind).score == pytest.approx(0.6 / 0.8)
    (body,) = asked.bodies
    text = body["messages"][0]["content"] if kind == "chat" else body["prompt"]
    assert text == "2 + 2 =|four {answer}? {x}"
    assert (body["max_tokens"], body["temperature"]) == (1, 0)


def test_a_stage_that_says_neither_yes_nor_no_does_not_verify() -> None:
    choice = {
        "text": "?",
        "finish_reason": "length",
        "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"?": -0.1}]},
    }
    answer = Reply.parse("completions", {"choices": [choice], "usage": {"prompt_tokens": 1}})
    assert judge(SelfVerification("{question}{answer}", 100), [reply("4")], Asked(answer)).score == 0.0


def model(path: Path, policy: str, **models: Any) -> str:
    path.write_text(json.dumps({"policy": policy, "models": models}))
    return str(path)


CONSTANT = {"weights": 0.0, "mean": 0.0, "scale": 1.0}


def test_a_scorer_is_a_logistic_model_of_the_answers_figures(tmp_path: Path) -> None:
    weights = [float(name == "least") for name in FIGURES]
    file = model(tmp_path / "m", "scorer", answer={**CONSTANT, "weights": weights, "bias": -0.5})
    policy = build(ScorerSettings(kind="scorer", model=file), ["a", "b"])
    found = judge(policy, [reply("x", logprobs=[[math.log(0.2), math.log(0.7)]])])
    assert found.score == pytest.approx(1 / (1 + math.exp(0.3)))


def test_an_http_scorer_is_asked_about_every_choice() -> None:
    asked = Asked({"x": 0.9, "y": 0.4})
    assert (
        judge(build(ScorerSettings(kind="scorer", url="http://s"), ["a", "b"]), [reply("x", "y")], asked).score == 0.4
    )
    assert asked.pairs == [("2 + 2 =", "x"), ("2 + 2 =", "y")]


def test_a_classifier_starts_at_the_first_stage_that_is_likely_good_enough(tmp_path: Path) -> None:
    models = {"a": {**CONSTANT, "bias": -1.0}, "b": {**CONSTANT, "bias": 1.0}}
    policy = build(
        ClassifierSettings(kind="classifier", model=model(tmp_path / "m", "classifier", **models)), ["a", "b", "c"]
    )
    asked = Request("r", "completions", {"prompt": "x"}, "t", 0.0)
    starts = [
        policy.start(Request(asked.id, asked.kind, asked.body, "t", threshold), ["a", "b", "c"])
        for threshold in (0.2, 0.3, 0.7, 0.8, 1.0)
    ]
    assert starts == [0, 1, 1, 2, 2]
    assert not policy.judges


def test_a_model_file_that_does_not_fit_is_refused_with_a_sentence(tmp_path: Path) -> None:
    good = {**CONSTANT, "bias": 0.0}
    cases = {
        "cannot be read": str(tmp_path / "absent"),
        "no classifier": model(tmp_path / "other", "scorer", answer=good),
        f"features \\(.*{1 << BITS}": model(tmp_path / "short", "classifier", a={**good, "weights": [1.0, 2.0]}),
        "not trained for stage 'a'": model(tmp_path / "stage", "classifier", b=good),
        "no weights": model(tmp_path / "nan", "classifier", a={**good, "scale": 0.0}),
    }
    for words, path in cases.items():
        with pytest.raises(CascadeConfigError, match=words):
            build(ClassifierSettings(kind="classifier", model=path), ["a", "b"], "c.yaml")


@pytest.mark.parametrize(("pattern", "words"), [("(", "not a regular expression"), ("a", "has 0 groups")])
def test_an_answer_pattern_is_checked(pattern: str, words: str) -> None:
    with pytest.raises(CascadeConfigError, match=words):
        build(VoteSettings(kind="vote", answer_pattern=pattern), ["a", "b"])
