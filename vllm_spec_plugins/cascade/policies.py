# SPDX-License-Identifier: Apache-2.0
"""When is a stage's answer good enough? Each policy gives it a score in 0 to 1; the request's threshold decides."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, assert_never

import numpy as np

from vllm_spec_plugins.cascade.config import (
    CascadeConfigError,
    ClassifierSettings,
    ConfidenceSettings,
    PolicySettings,
    ScorerSettings,
    VerificationSettings,
    VoteSettings,
)
from vllm_spec_plugins.cascade.logistic import BITS, FIGURES, Logistic, figures, ngrams
from vllm_spec_plugins.cascade.request import Body, Reply, Request, RequestError


class Asking(Protocol):
    """What a policy may do besides reading: a further call of the stage that it judges, or of an HTTP scorer."""

    async def stage(self, body: Body) -> Reply: ...

    async def scorer(self, question: str, answer: str) -> float: ...


@dataclass(frozen=True)
class Verdict:
    """`chosen`: which of the stage's replies is its answer; `score`: how good, 0 to 1."""

    score: float
    chosen: int = 0


class Policy(ABC):
    """How a stage is asked, and what its answer is worth."""

    def start(self, request: Request, stages: Sequence[str]) -> int:
        """The first stage to ask."""
        return 0

    @property
    def judges(self) -> bool:
        """Answers are judged; otherwise the first stage's is the cascade's."""
        return True

    def check(self, request: Request) -> None:  # noqa: B027 - a policy may judge everything
        """Raise RequestError on a request that this policy cannot judge."""

    def asks(self, request: Request) -> list[Body]:
        """What a judged stage is asked."""
        return [request.with_logprobs()]

    @abstractmethod
    async def judge(self, request: Request, replies: Sequence[Reply], asking: Asking) -> Verdict:
        """A verdict on the replies to `asks`, in their order. A reply's score is its worst choice's.

        Raises ReplyError when they lack what it judges by.
        """


@dataclass(frozen=True)
class Confidence(Policy):
    """The mean, least or q-quantile probability of the answer's tokens; an answer without tokens has 0.

    The maximum-probability rule of CascadeBERT (arXiv 2012.14682), over the tokens of a text.
    """

    statistic: str = "mean"
    quantile: float = 0.1

    def score(self, logprobs: Sequence[float]) -> float:
        if not logprobs:
            return 0.0
        chances = np.exp(np.minimum(np.asarray(logprobs, dtype=np.float64), 0.0))
        if self.statistic == "mean":
            return float(chances.mean())
        return float(chances.min() if self.statistic == "min" else np.quantile(chances, self.quantile))

    async def judge(self, request: Request, replies: Sequence[Reply], asking: Asking) -> Verdict:
        return Verdict(min(self.score(each) for each in replies[0].judged_logprobs()))


@dataclass(frozen=True)
class Vote(Policy):
    """K samples, half of them in each of two prompt styles; the score is the share of the commonest answer.

    Yue et al., "Large Language Model Cascades with Mixture of Thoughts Representations", arXiv 2310.03094, section 3.
    Samples agree when their answers do: what `pattern`'s first group matches last, or the whole text, without regard to
    case, spaces and a final full stop. A sample in which the pattern matches nothing agrees with none. The answer is the
    first sample of the majority.
    """

    samples: int
    temperature: float
    styles: tuple[str, str]
    pattern: re.Pattern[str] | None = None

    def check(self, request: Request) -> None:
        if (request.body.get("n") or 1) != 1:
            raise RequestError(
                f"n={request.body['n']} asks for several answers, and this cascade votes for one; leave n out"
            )
        request.question()

    def asks(self, request: Request) -> list[Body]:
        # A deterministic request stays one: its samples have fixed seeds.
        seed = request.body.get("seed")
        if seed is None and request.body.get("temperature") == 0:
            seed = 0
        seeds = [{} if seed is None else {"seed": seed + index} for index in range(self.samples)]
        return [
            request.in_style(self.styles[index % 2], temperature=self.temperature, **each)
            for index, each in enumerate(seeds)
        ]

    def answer(self, text: str) -> str | None:
        """What samples are compared by."""
        if self.pattern is not None:
            matches = list(self.pattern.finditer(text))
            if not matches:
                return None
            text = matches[-1].group(1)
        return " ".join(text.casefold().split()).rstrip(".")

    async def judge(self, request: Request, replies: Sequence[Reply], asking: Asking) -> Verdict:
        answers = [self.answer(reply.texts[0]) for reply in replies]
        votes = Counter(answer for answer in answers if answer is not None)
        if not votes:
            return Verdict(0.0)
        # Of equally common answers the first: a Counter keeps their order.
        answer, count = votes.most_common(1)[0]
        return Verdict(count / len(answers), answers.index(answer))


@dataclass(frozen=True)
class Scorer(Policy):
    """g(question, answer) of FrugalGPT (arXiv 2305.05176): a logistic model of the answer's figures, or an HTTP scorer."""

    model: Logistic | None = None

    def check(self, request: Request) -> None:
        request.question()

    async def judge(self, request: Request, replies: Sequence[Reply], asking: Asking) -> Verdict:
        question = request.question()
        if self.model is not None:
            return Verdict(min(self.model(figures(question, each)) for each in replies[0].judged_logprobs()))
        return Verdict(min([await asking.scorer(question, text) for text in replies[0].texts]))

    def asks(self, request: Request) -> list[Body]:
        return [request.with_logprobs() if self.model is not None else request.asking()]


@dataclass(frozen=True)
class SelfVerification(Policy):
    """The stage says whether its own answer is right: P(yes) / (P(yes) + P(no)) of its next token.

    The self-verification of AutoMix (arXiv 2310.12963, section 3.1), read from the probabilities instead of from samples. A
    stage for which neither word is among its likeliest tokens gives 0.
    """

    template: str
    max_characters: int

    CANDIDATES = 20  # vLLM's default limit for `logprobs`

    def check(self, request: Request) -> None:
        if (request.body.get("n") or 1) != 1:
            raise RequestError(
                f"n={request.body['n']} asks for several answers, and this cascade verifies one; leave n out"
            )
        request.question()

    def asks(self, request: Request) -> list[Body]:
        return [request.asking()]

    async def judge(self, request: Request, replies: Sequence[Reply], asking: Asking) -> Verdict:
        texts = {"{question}": request.question(), "{answer}": replies[0].texts[0]}
        texts = {key: text[-self.max_characters :] for key, text in texts.items()}
        # Not str.format: questions and templates have braces of their own.
        question = re.sub(r"\{question\}|\{answer\}", lambda match: texts[match.group()], self.template)
        wanted: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
        if request.kind == "chat":
            wanted |= {"logprobs": True, "top_logprobs": self.CANDIDATES}
        else:
            wanted |= {"logprobs": self.CANDIDATES}
        reply = await asking.stage(request.plain(question, **wanted))
        chance = {"yes": 0.0, "no": 0.0}
        for token, logprob in reply.first_candidates().items():
            word = token.strip().strip(".,!").lower()
            if word in chance:
                chance[word] += math.exp(min(logprob, 0.0))
        total = sum(chance.values())
        return Verdict(chance["yes"] / total if total else 0.0)


@dataclass(frozen=True)
class Classifier(Policy):
    """The prompt alone decides: the first stage whose P(its answer is good) reaches the threshold.

    RouteLLM (arXiv 2406.18665, section 4), with a logistic model in the place of its routers.
    """

    models: Mapping[str, Logistic]

    @property
    def judges(self) -> bool:
        return False

    def check(self, request: Request) -> None:
        request.question()

    def start(self, request: Request, stages: Sequence[str]) -> int:
        features = ngrams(request.question())
        good = (i for i, name in enumerate(stages[:-1]) if self.models[name](features) >= request.threshold)
        return next(good, len(stages) - 1)

    async def judge(self, request: Request, replies: Sequence[Reply], asking: Asking) -> Verdict:
        raise AssertionError("a classifier has decided before there is an answer")


def build(settings: PolicySettings, stages: Sequence[str], source: str = "cascade") -> Policy:
    """The policy of a configuration. Raises CascadeConfigError on a model file that does not fit, or a wrong pattern."""
    if isinstance(settings, ConfidenceSettings):
        return Confidence(settings.statistic, settings.quantile)
    if isinstance(settings, VoteSettings):
        return Vote(settings.samples, settings.temperature, _pair(settings.styles), _pattern(settings, source))
    if isinstance(settings, VerificationSettings):
        return SelfVerification(settings.template, settings.max_characters)
    if isinstance(settings, ScorerSettings):
        if settings.model is None:
            return Scorer()
        return Scorer(_model(Path(settings.model), "scorer", len(FIGURES), source)["answer"])
    if isinstance(settings, ClassifierSettings):
        models = _model(Path(settings.model), "classifier", 1 << BITS, source)
        lacking = [name for name in stages[:-1] if name not in models]
        if lacking:
            raise CascadeConfigError(
                f"{source}: policy.model={settings.model} was not trained for stage {lacking[0]!r}; "
                f"it knows {', '.join(models)}"
            )
        return Classifier(models)
    assert_never(settings)


def _pair(styles: Sequence[str]) -> tuple[str, str]:
    first, second = styles
    return first, second


def _pattern(settings: VoteSettings, source: str) -> re.Pattern[str] | None:
    if settings.answer_pattern is None:
        return None
    try:
        pattern = re.compile(settings.answer_pattern)
    except re.error as error:
        raise CascadeConfigError(
            f"{source}: policy.answer_pattern={settings.answer_pattern!r} is not a regular expression ({error})"
        ) from error
    if pattern.groups != 1:
        raise CascadeConfigError(
            f"{source}: policy.answer_pattern={settings.answer_pattern!r} has {pattern.groups} groups; valid is one, the answer"
        )
    return pattern


def _model(path: Path, policy: str, dimension: int, source: str) -> dict[str, Logistic]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["policy"] != policy:
            raise ValueError(f"is a {held['policy']}")
        return {name: Logistic.from_dict(each, dimension) for name, each in held["models"].items()}
    except OSError as error:
        raise CascadeConfigError(f"{source}: policy.model={path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CascadeConfigError(
            f"{source}: policy.model={path} is no {policy} of `vllm-spec tune router` ({error})"
        ) from error
