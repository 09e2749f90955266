# SPDX-License-Identifier: Apache-2.0
"""One request through the stages: asked, judged, answered or handed on, paid for once."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm_spec_plugins.cascade.config import BudgetSettings
from vllm_spec_plugins.cascade.ledger import Bill, Ledger
from vllm_spec_plugins.cascade.policies import Policy
from vllm_spec_plugins.cascade.request import UNFINISHED, Body, Kind, Reply, ReplyError, Request
from vllm_spec_plugins.tools.router.metrics import Metrics
from vllm_spec_plugins.tools.router.scorer import HttpScorer, Unjudged
from vllm_spec_plugins.tools.router.stage import Answer, Stage, StageFailed, Stream
from vllm_spec_plugins.tools.router.upstream import CallFailed, Refused

logger = logging.getLogger(__name__)

T = TypeVar("T")


class OverBudget(Exception):
    """The next call could cost more than the request's or the tenant's budget leaves."""


@dataclass(frozen=True)
class _Asking:
    """What a policy may ask while it judges one stage's answer to one request."""

    request: Request
    of: Stage
    bill: Bill
    http_scorer: HttpScorer | None

    async def stage(self, body: Body) -> Reply:
        return (await self.of.call(self.request, body, self.bill)).reply

    async def scorer(self, question: str, answer: str) -> float:
        assert self.http_scorer is not None
        return await self.http_scorer.score(question, answer)


@dataclass(frozen=True)
class Judged:
    """A stage's answer and its score; `limited`: kept below the threshold because the budget allows no more."""

    stage: Stage
    answer: Answer
    score: float | None = None
    limited: bool = False


class Cascade:
    """The stages behind one policy."""

    def __init__(
        self,
        stages: Sequence[Stage],
        policy: Policy,
        budget: BudgetSettings,
        ledger: Ledger,
        metrics: Metrics,
        scorer: HttpScorer | None = None,
    ) -> None:
        self.stages, self.policy, self.ledger, self.metrics = list(stages), policy, ledger, metrics
        self._budget, self._scorer = budget, scorer

    async def run(self, request: Request) -> Whole | Live:
        """The answer, whole or as it comes.

        Raises RequestError, Refused, Busy, OverBudget and StageFailed; the request is settled then, and nothing is billed.
        """
        bill, began = self.ledger.open(request.id, request.tenant), time.monotonic()
        try:
            found = await self._run(request, bill)
        except BaseException as error:
            bill.settle(None)
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
            self.metrics.request(outcome, "", time.monotonic() - began)
            raise
        if isinstance(found, Judged):
            bill.settle(found.answer.attempt)
            self.metrics.request("answered", found.stage.name, time.monotonic() - began)
            return Whole(request, found, bill)
        stage, stream = found
        return Live(request, stage, stream, bill, self.metrics, began)

    async def _run(self, request: Request, bill: Bill) -> Judged | tuple[Stage, Stream]:
        self.policy.check(request)
        start = self.policy.start(request, [stage.name for stage in self.stages])
        held: Judged | None = None
        failure: StageFailed | None = None
        for stage in self.stages[start:]:
            judges = self.policy.judges and stage is not self.stages[-1]
            asks = self.policy.asks(request) if judges else [request.asking()]
            if not self._affords(stage, request, bill, len(asks), held):
                if held is None:
                    raise OverBudget(f"stage {stage.name} could cost more than the budget leaves")
                return Judged(held.stage, held.answer, held.score, limited=True)
            try:
                if not judges:
                    if request.streams:
                        return stage, await stage.open(request, bill)
                    return Judged(stage, await stage.call(request, asks[0], bill))
                held = await self._judge(stage, request, asks, bill)
                assert held.score is not None
                if held.score >= request.threshold:
                    return held
            except (StageFailed, Unjudged) as error:
                logger.warning("request %s: %s", request.id, error)
                if isinstance(error, Unjudged):
                    self.metrics.unjudged(stage.name)
                else:
                    failure = error
        assert failure is not None, "the last stage answers or fails"
        raise failure

    async def _judge(self, stage: Stage, request: Request, asks: Sequence[Body], bill: Bill) -> Judged:
        answers = await together([stage.call(request, body, bill) for body in asks])
        asking = _Asking(request, stage, bill, self._scorer)
        try:
            verdict = await self.policy.judge(request, [answer.reply for answer in answers], asking)
        except (ReplyError, Refused) as error:
            # Refused: a question of the policy's own, longer than the model's context perhaps.
            raise Unjudged(f"the answer of stage {stage.name} was not judged: {error}") from error
        return Judged(stage, answers[verdict.chosen], verdict.score)

    def _affords(self, stage: Stage, request: Request, bill: Bill, calls: int, held: Judged | None) -> bool:
        """The most that the calls may cost, as far as known before they are made, is within both budgets."""
        limits = [self._budget.per_request]
        if self._budget.per_tenant is not None:
            limits.append(self._budget.per_tenant - self.ledger.billed(request.tenant))
        left = min((limit - bill.cost for limit in limits if limit is not None), default=None)
        if left is None:
            return True
        outputs = (request.body.get("n") or 1) * (request.max_tokens or self._budget.assumed_tokens)
        inputs = held.answer.reply.input_tokens if held else _length(request)
        return calls * stage.price.of(inputs, outputs) <= left


def _length(request: Request) -> int:
    """Tokens of the prompt before any model has counted them: as many as it has words, signs or ids, at a guess."""
    what = request.body.get("prompt") if request.kind == "completions" else request.body.get("messages")
    if isinstance(what, list) and what and all(isinstance(token, int) for token in what):
        return len(what)
    return len(json.dumps(what, ensure_ascii=False)) // 3


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; at the first failure the other calls are given up before it is raised."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Response(ABC):
    """A response that is known whole."""

    request: Request

    @abstractmethod
    def payload(self) -> Body:
        """Its JSON."""

    def chunks(self) -> list[bytes]:
        """The same as server-sent events, each choice in one piece."""
        whole = self.payload()
        frame: dict[str, Any] = {key: value for key, value in whole.items() if key in ("id", "created", "model")}
        frame["object"] = "chat.completion.chunk" if self.request.kind == "chat" else "text_completion"
        out = []
        for choice in whole["choices"]:
            piece = {"index": choice["index"], "logprobs": choice.get("logprobs")}
            if self.request.kind == "chat":
                message = {key: value for key, value in choice["message"].items() if value not in (None, [])}
                # In a stream tool calls are numbered.
                calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
                piece["delta"] = {**message, "tool_calls": calls} if calls else message
                end: dict[str, Any] = {"delta": {}}
            else:
                piece["text"] = choice["text"]
                end = {"text": ""}
            out.append(sse({**frame, "choices": [{**piece, "finish_reason": None}]}))
            ends = {key: choice.get(key) for key in ("index", "finish_reason", "stop_reason")}
            last = {"cascade": whole["cascade"]} if choice is whole["choices"][-1] else {}
            out.append(sse({**frame, "choices": [{**end, **ends, "logprobs": None}], **last}))
        if self.request.wants_usage:
            out.append(sse({**frame, "choices": [], "usage": whole["usage"], "cascade": whole["cascade"]}))
        return [*out, sse(b"[DONE]")]


@dataclass(frozen=True)
class Whole(Response):
    """An answer that was just made, and is settled."""

    request: Request
    judged: Judged
    bill: Bill

    def account(self) -> dict[str, Any]:
        score = {} if self.judged.score is None else {"score": self.judged.score, "limited": self.judged.limited}
        return {**account(self.request, self.judged.stage, self.bill), **score}

    def payload(self) -> Body:
        reply = self.judged.answer.reply
        choices = reply.payload["choices"]
        if not asked_for_logprobs(self.request):
            choices = [{**choice, "logprobs": None} for choice in choices]
        return {**reply.payload, **named(self.request), "choices": choices, "cascade": self.account()}


@dataclass(frozen=True)
class Cached(Response):
    """An answer of the answer cache: it costs nothing."""

    request: Request
    found: Body

    def payload(self) -> Body:
        owed = {"cached": True, "attempts": 0, "cost": 0.0, "threshold": self.request.threshold}
        return {**self.found, **named(self.request), "cascade": owed}


class Live:
    """An answer that comes as its stage writes it: iterate once, then `close`.

    The end of a choice is held back until the upstream has sent everything, usage and [DONE] included. A stream that breaks
    ends with an error event: no finish reason, no [DONE], nothing billed.
    """

    def __init__(
        self, request: Request, stage: Stage, stream: Stream, bill: Bill, metrics: Metrics, began: float
    ) -> None:
        self.request, self.stage, self.bill = request, stage, bill
        self._stream, self._metrics, self._began = stream, metrics, began
        self._error: BaseException | None = None
        # Given the whole response and what the request cost, once it is complete.
        self.keep: Callable[[Body, float], Awaitable[None]] | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._relay():
                yield chunk
        except CallFailed as error:
            logger.warning("request %s: %s", self.request.id, error)
            self._error = error
            self._settle("failed")
            what = f"stage {self.stage.name} broke off: {error}; this answer is not complete"
            yield sse(failure(what, "upstream_error", 502))

    async def _relay(self) -> AsyncIterator[bytes]:
        everything: list[dict[str, Any]] = []
        begun: set[int] = set()
        ended: set[int] = set()
        ends: list[dict[str, Any]] = []
        usage: dict[str, Any] | None = None
        async for chunk in self._all():
            try:
                usage = chunk.get("usage") or usage
                choices = chunk["choices"]
                begun |= {choice["index"] for choice in choices}
                over = {choice["index"] for choice in choices if choice.get("finish_reason") not in UNFINISHED}
                gave_up = [choice for choice in choices if choice.get("finish_reason") in UNFINISHED[1:]]
            except (KeyError, TypeError, AttributeError) as error:
                raise CallFailed(
                    f"upstream {self._stream.upstream.name} sent no chunk of the OpenAI interface"
                ) from error
            if gave_up:
                raise CallFailed(f"upstream {self._stream.upstream.name} gave an answer up")
            if not choices:
                continue
            shown = {**chunk, **named(self.request)}
            if self.keep is not None:
                everything.append(shown)
            ended |= over
            if over:
                ends.append(shown)
            else:
                yield sse(shown)
        if begun != ended or usage is None:
            raise CallFailed(f"upstream {self._stream.upstream.name} ended its stream without the end of its answer")
        self._settle("completed", int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))
        owed = account(self.request, self.stage, self.bill)
        for chunk in ends:
            yield sse({**chunk, "cascade": owed} if chunk is ends[-1] else chunk)
        if self.request.wants_usage:
            frame = {key: value for key, value in ends[-1].items() if key in ("id", "object", "created", "model")}
            yield sse({**frame, "choices": [], "usage": usage, "cascade": owed})
        yield sse(b"[DONE]")
        if self.keep is not None and (whole := joined(self.request.kind, everything, usage)) is not None:
            await self.keep(whole, self.bill.cost)

    async def _all(self) -> AsyncIterator[Any]:
        for chunk in self._stream.first:
            yield chunk
        async for chunk in self._stream.rest:
            yield chunk

    def _settle(self, outcome: Any, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.stage.ended(self._stream, self.bill, outcome, input_tokens, output_tokens)
        self.bill.settle(self._stream.attempt if outcome == "completed" else None)
        word = {"completed": "answered", "failed": "broken"}.get(outcome, outcome)
        self._metrics.request(word, self.stage.name, time.monotonic() - self._began)

    async def close(self) -> None:
        """Give everything back; a client that left before the end pays nothing."""
        if not self.bill.settled:
            self._error = asyncio.CancelledError()
            self._settle("cancelled")
        await self._stream.close(self._error)


def joined(kind: Kind, chunks: Sequence[Body], usage: Body) -> Body | None:
    """The whole response that a stream's chunks add up to; None where they hold more than text and its end."""
    texts: dict[int, str] = {}
    ends: dict[int, Body] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice["delta"] if kind == "chat" else {"content": choice["text"]}
        more = {key for key, value in {**choice, **delta}.items() if value}
        if more - {"index", "delta", "text", "role", "content", "finish_reason", "stop_reason"}:
            return None
        index = choice["index"]
        texts[index] = texts.get(index, "") + (delta.get("content") or "")
        if choice.get("finish_reason") is not None:
            ends[index] = {key: choice.get(key) for key in ("finish_reason", "stop_reason")}
    choices = []
    for index, text in sorted(texts.items()):
        what = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
        choices.append({"index": index, **what, "logprobs": None, **ends[index]})
    name = "chat.completion" if kind == "chat" else "text_completion"
    return {"object": name, "created": chunks[0].get("created", 0), "choices": choices, "usage": usage}


def named(request: Request) -> dict[str, Any]:
    """What a response is called: after the request, not after an upstream's."""
    prefix = "chatcmpl" if request.kind == "chat" else "cmpl"
    return {"id": f"{prefix}-{request.id}", "model": request.body["model"]}


def account(request: Request, stage: Stage, bill: Bill) -> dict[str, Any]:
    """The ``cascade`` object of a response."""
    return {
        "stage": stage.name,
        "model": stage.model,
        "attempts": bill.attempts,
        "cost": bill.cost,
        "threshold": request.threshold,
    }


def asked_for_logprobs(request: Request) -> bool:
    given = request.body.get("logprobs")
    return bool(given) if request.kind == "chat" else given is not None


def failure(message: str, kind: str, code: int) -> dict[str, Any]:
    """An error as the OpenAI interface has it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def sse(data: dict[str, Any] | bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"
