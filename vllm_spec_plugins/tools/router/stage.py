# SPDX-License-Identifier: Apache-2.0
"""One model behind the router: which of its servers is asked, how often, and what is entered in the ledger for it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_spec_plugins.cascade.config import RetrySettings, StageSettings
from vllm_spec_plugins.cascade.ledger import Bill, Entry, Outcome, Price
from vllm_spec_plugins.cascade.request import UNFINISHED, Body, Reply, ReplyError, Request
from vllm_spec_plugins.tools.router.metrics import Metrics
from vllm_spec_plugins.tools.router.upstream import CallFailed, Upstream


class StageFailed(Exception):
    """No upstream of the stage gave an answer."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """A whole reply, and the attempt that brought it."""

    attempt: str
    reply: Reply


@dataclass
class Stream:
    """An open reply: its first chunks up to the first text, then the others. Closed by `close`, whatever happened."""

    attempt: str
    upstream: Upstream
    first: list[Any]
    rest: AsyncIterator[Any]
    stack: contextlib.AsyncExitStack = field(repr=False)

    async def close(self, error: BaseException | None = None) -> None:
        """Give the upstream's place back. `error`: how reading ended; the breaker hears of it."""
        # The contexts see what happened between their begin and end; they raise it again, and it is known here.
        with contextlib.suppress(*([type(error)] if error else [])):
            await self.stack.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)


class Stage:
    """Calls to one model."""

    def __init__(
        self, settings: StageSettings, upstreams: Sequence[Upstream], retry: RetrySettings, metrics: Metrics
    ) -> None:
        self.name, self.model, self.upstreams = settings.name, settings.model, list(upstreams)
        # From the file's price per million tokens.
        self.price = Price(settings.input_price * 1e-6, settings.output_price * 1e-6)
        self._settings, self._retry, self._metrics = settings, retry, metrics

    @property
    def available(self) -> bool:
        return any(upstream.available for upstream in self.upstreams)

    def _pick(self, tried: Sequence[Upstream]) -> Upstream | None:
        """The least loaded of the available upstreams, those that were not tried yet first."""
        ready = [upstream for upstream in self.upstreams if upstream.available]
        return min(ready, key=lambda each: (tried.count(each), each.load), default=None)

    async def _picks(self) -> AsyncIterator[Upstream]:
        """An upstream for each attempt, with the wait before it; none when there is none, or no attempt left."""
        tried: list[Upstream] = []
        for number in range(self._retry.attempts):
            if number:
                wait = min(self._retry.most, self._retry.backoff * 2 ** (number - 1))
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            upstream = self._pick(tried)
            if upstream is None:
                return
            tried.append(upstream)
            yield upstream

    def _failed(self, last: Exception | None) -> StageFailed:
        why = last if last is not None else "none of its upstreams is up"
        return StageFailed(f"stage {self.name} gave no answer: {why}", min(u.retry_after for u in self.upstreams))

    async def call(self, request: Request, body: Body, bill: Bill) -> Answer:
        """A whole reply. Raises StageFailed, and from upstream.py Busy and Refused."""
        last: Exception | None = None
        async for upstream in self._picks():
            try:
                if self._settings.hedge_after is None or len(self.upstreams) == 1:
                    # Without a task of its own: the upstream's load counts this call before another one is placed.
                    return self._paid(await self._once(upstream, request, body, bill), upstream, bill)
                return await self._hedged(upstream, self._settings.hedge_after, request, body, bill)
            except CallFailed as error:
                last = error
        raise self._failed(last)

    def _paid(self, answer: Answer, upstream: Upstream, bill: Bill) -> Answer:
        counts = answer.reply.input_tokens, answer.reply.output_tokens
        self._enter(bill, answer.attempt, upstream, "completed", *counts)
        return answer

    async def _hedged(self, upstream: Upstream, delay: float, request: Request, body: Body, bill: Bill) -> Answer:
        """One attempt, after `delay` a second beside it. The first whole reply is the one paid for."""
        tasks = {asyncio.create_task(self._once(upstream, request, body, bill)): upstream}
        winner: asyncio.Task[Answer] | None = None
        last: BaseException | None = None
        pending = set(tasks)
        try:
            if not (await asyncio.wait(pending, timeout=delay))[0]:
                other = self._pick([upstream])
                if other is not None and other is not upstream:
                    hedge = asyncio.create_task(self._once(other, request, body, bill))
                    tasks[hedge] = other
                    pending.add(hedge)
            while pending and winner is None:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (error := task.exception()) is not None:
                        last = error
                    elif winner is None:
                        winner = task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task, whose in tasks.items():
                # A reply that came too late, or for nobody: nobody pays.
                if task is not winner and not task.cancelled() and task.exception() is None:
                    self._enter(bill, task.result().attempt, whose, "cancelled")
        if winner is None:
            assert last is not None
            raise last
        return self._paid(winner.result(), tasks[winner], bill)

    async def _once(self, upstream: Upstream, request: Request, body: Body, bill: Bill) -> Answer:
        attempt = bill.attempt()
        try:
            async with upstream.place():
                try:
                    async with asyncio.timeout(self._settings.timeout):
                        payload = await upstream.post(request.path, {**body, "model": self.model}, attempt)
                    return Answer(attempt, Reply.parse(request.kind, payload))
                except (TimeoutError, ReplyError) as error:
                    what = error if str(error) else f"no answer within {self._settings.timeout:g} s"
                    raise CallFailed(f"upstream {upstream.name}: {what}") from error
        except asyncio.CancelledError:
            self._enter(bill, attempt, upstream, "cancelled")
            raise
        except Exception:
            self._enter(bill, attempt, upstream, "failed")
            raise

    async def open(self, request: Request, bill: Bill) -> Stream:
        """A reply that streams, from its first text on; until then another upstream may take over. Raises as `call`."""
        options = {**(request.body.get("stream_options") or {}), "include_usage": True}
        body = request.asking(model=self.model, stream=True, stream_options=options)
        last: Exception | None = None
        async for upstream in self._picks():
            attempt = bill.attempt()
            try:
                async with contextlib.AsyncExitStack() as stack:
                    await stack.enter_async_context(upstream.place())
                    try:
                        async with asyncio.timeout(self._settings.timeout):
                            chunks = await stack.enter_async_context(upstream.stream(request.path, body, attempt))
                            first = await _until_text(chunks, upstream)
                    except TimeoutError as error:
                        raise CallFailed(
                            f"upstream {upstream.name}: no text within {self._settings.timeout:g} s"
                        ) from error
                    return Stream(attempt, upstream, first, chunks, stack.pop_all())
            except CallFailed as error:
                self._enter(bill, attempt, upstream, "failed")
                last = error
            except asyncio.CancelledError:
                self._enter(bill, attempt, upstream, "cancelled")
                raise
            except Exception:
                self._enter(bill, attempt, upstream, "failed")
                raise
        raise self._failed(last)

    def ended(
        self, stream: Stream, bill: Bill, outcome: Outcome, input_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """Enter what became of a stream."""
        self._enter(bill, stream.attempt, stream.upstream, outcome, input_tokens, output_tokens)

    def _enter(
        self,
        bill: Bill,
        attempt: str,
        upstream: Upstream,
        outcome: Outcome,
        input_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        cost = self.price.of(input_tokens, output_tokens)
        where = (bill.request, attempt, bill.tenant, self.name, upstream.name, self.model)
        bill.add(Entry(*where, outcome, input_tokens, output_tokens, cost))
        self._metrics.attempt(self.name, upstream.name, outcome, input_tokens, output_tokens, cost)


async def _until_text(chunks: AsyncIterator[Any], upstream: Upstream) -> list[Any]:
    """The first chunks, up to one that a reader would see: text, a tool call or an end."""
    first = []
    async for chunk in chunks:
        first.append(chunk)
        for choice in chunk.get("choices", ()):
            delta = {key: value for key, value in choice.get("delta", {}).items() if key != "role"}
            if choice.get("text") or any(delta.values()) or choice.get("finish_reason") not in UNFINISHED:
                return first
    raise CallFailed(f"upstream {upstream.name} streamed no answer")
