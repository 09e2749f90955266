# SPDX-License-Identifier: Apache-2.0
"""The router's HTTP interface, on any FastAPI application."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import math
import os
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from vllm_spec_plugins.cascade import policies
from vllm_spec_plugins.cascade.config import CascadeConfigError, CascadeSettings, ScorerSettings, client_keys, secret
from vllm_spec_plugins.cascade.ledger import Ledger
from vllm_spec_plugins.cascade.request import Kind, RequestError
from vllm_spec_plugins.cascade.request import Request as Asked
from vllm_spec_plugins.tools.router.answers import Slot, fingerprint, open_answers
from vllm_spec_plugins.tools.router.cascade import Cached, Cascade, Live, OverBudget, Whole, failure
from vllm_spec_plugins.tools.router.cascade import Response as Answered
from vllm_spec_plugins.tools.router.metrics import Metrics
from vllm_spec_plugins.tools.router.scorer import HttpScorer
from vllm_spec_plugins.tools.router.stage import Stage, StageFailed
from vllm_spec_plugins.tools.router.upstream import Busy, Refused, Upstream

logger = logging.getLogger(__name__)

NAME = "cascade"


class Unauthorized(Exception):
    """A client without a key that this router knows."""


class Gone(Exception):
    """The client closed the connection before its answer."""


class NoSuchModel(Exception):
    """A model name that is not the cascade's."""


class Service:
    """A cascade built from its settings, with everything that it holds open.

    Args:
        settings: of the configuration file.
        source: what messages call that file.
        environment: where the keys are.
        transport: stands in for the network in tests.

    Raises CascadeConfigError where a key, a model file or the ledger cannot be used.
    """

    def __init__(
        self,
        settings: CascadeSettings,
        source: str = "cascade",
        environment: Mapping[str, str] = os.environ,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings, self.metrics = settings, Metrics()
        try:
            keys = client_keys(settings.client_keys_env, environment)
            names = [stage.name for stage in settings.stages]
            policy = policies.build(settings.policy, names, source)
            path = None if settings.ledger is None else Path(settings.ledger)
            stages = [
                Stage(
                    stage,
                    [
                        Upstream(
                            upstream,
                            secret(upstream.api_key_env, f"stages.{i}.upstreams.{j}.api_key_env", environment),
                            settings.health,
                            stage.timeout,
                            transport,
                        )
                        for j, upstream in enumerate(stage.upstreams)
                    ],
                    settings.retry,
                    self.metrics,
                )
                for i, stage in enumerate(settings.stages)
            ]
            self._scorer = None
            if isinstance(settings.policy, ScorerSettings) and settings.policy.url is not None:
                key = secret(settings.policy.api_key_env, "policy.api_key_env", environment)
                self._scorer = HttpScorer(settings.policy.url, key, settings.policy.timeout, transport)
            self._answers = open_answers(settings, source)
            self._ledger = Ledger(path, settings.budget.window)
        except CascadeConfigError as error:
            raise CascadeConfigError(
                str(error) if str(error).startswith(f"{source}: ") else f"{source}: {error}"
            ) from error
        except (OSError, ValueError) as error:
            raise CascadeConfigError(f"{source}: ledger={settings.ledger}: cannot be used ({error})") from error
        self._fingerprint = fingerprint(settings)
        # Compared as digests, all of them: the time says nothing about a key.
        self._tenants = [(hashlib.sha256(key.encode()).digest(), tenant) for key, tenant in keys.items()]
        self.cascade = Cascade(stages, policy, settings.budget, self._ledger, self.metrics, self._scorer)

    @property
    def upstreams(self) -> list[Upstream]:
        return [upstream for stage in self.cascade.stages for upstream in stage.upstreams]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """With its health checks."""
        await asyncio.gather(*(upstream.check() for upstream in self.upstreams))
        watches = [asyncio.create_task(upstream.watch()) for upstream in self.upstreams]
        try:
            yield
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await asyncio.gather(*(upstream.close() for upstream in self.upstreams))
            if self._scorer is not None:
                await self._scorer.close()
            self._ledger.close()
            if self._answers is not None:
                self._answers.close()

    def tenant(self, authorization: str | None) -> str:
        """Whose request it is. Raises Unauthorized."""
        if not self._tenants:
            return "anonymous"
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthorized("the request has no API key that this router knows; send Authorization: Bearer KEY")
        return found[0]

    def asked(self, kind: Kind, body: Any, tenant: str) -> Asked:
        """Raises RequestError, NoSuchModel."""
        if not isinstance(body, dict):
            raise RequestError("the request's body is not a JSON object")
        if kind == "chat":
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
                raise RequestError("messages is not a list of messages; write at least one")
        elif "prompt" not in body:
            raise RequestError("prompt is missing")
        for key in ("n", "max_tokens", "max_completion_tokens", "seed"):
            if key in body and body[key] is not None and type(body[key]) is not int:
                raise RequestError(f"{key}={body[key]!r} is not a whole number")
        if not isinstance(body.get("stream_options") or {}, dict):
            raise RequestError("stream_options is not an object")
        return Asked(uuid.uuid4().hex, kind, body, tenant, self.threshold(body.get("model")))

    def threshold(self, model: Any) -> float:
        """``cascade`` has the configured one, ``cascade-0.7`` another. Raises NoSuchModel."""
        if model == NAME:
            return self.settings.threshold
        number = model.removeprefix(f"{NAME}-") if isinstance(model, str) and model.startswith(f"{NAME}-") else ""
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0.0 <= value <= 1.0:
            raise NoSuchModel(
                f"there is no model {model!r}; valid are {NAME} and {NAME}-X with a threshold X from 0 to 1"
            )
        return value

    async def serve(self, kind: Kind, request: Request) -> Response:
        """One request, answered or refused."""
        try:
            tenant = self.tenant(request.headers.get("authorization"))
            asked = self.asked(kind, parsed(await request.body()), tenant)
            found = await unless_gone(request, self._answer(asked, request.headers))
        except Exception as error:
            return refusal(error)
        headers = {"X-Request-Id": asked.id}
        if isinstance(found, Live):
            return Relay(found, headers)
        if asked.streams:
            return StreamingResponse(_each(found), headers=headers, media_type="text/event-stream")
        return JSONResponse(found.payload(), headers=headers)

    async def _answer(self, asked: Asked, headers: Mapping[str, str]) -> Answered | Live:
        """From the cache, or from the cascade and into the cache."""
        slot = None
        if self._answers is not None:
            slot = Slot.of(self._answers, asked, asked.tenant if self._tenants else None, headers, self._fingerprint)
        if slot is not None and (payload := await slot.find()) is not None:
            self.metrics.request("cached", "", 0.0)
            return Cached(asked, payload)
        found = await self.cascade.run(asked)
        if slot is not None and isinstance(found, Live):
            found.keep = slot.keep
        elif slot is not None and isinstance(found, Whole) and not found.judged.limited:
            await slot.keep(found.payload(), found.bill.cost)
        return found

    def router(self, prefix: str = "") -> APIRouter:
        """The routes, with the service's life tied to the application's."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            async with self.running():
                yield

        router = APIRouter(prefix=prefix, lifespan=lifespan)

        @router.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await self.serve("chat", request)

        @router.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await self.serve("completions", request)

        @router.get("/v1/models")
        async def models(request: Request) -> Response:
            try:
                self.tenant(request.headers.get("authorization"))
            except Unauthorized as error:
                return refusal(error)
            names = [NAME, f"{NAME}-{self.settings.threshold:g}"]
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm-spec"} for name in names]
            return JSONResponse({"object": "list", "data": data})

        @router.get("/health")
        async def health() -> Response:
            """200 while any stage can answer."""
            up = {stage.name: stage.available for stage in self.cascade.stages}
            return JSONResponse({"stages": up}, 200 if any(up.values()) else 503)

        @router.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics.render(self.upstreams), media_type="text/plain; version=0.0.4")

        return router

    def app(self) -> FastAPI:
        """The router as an application of its own."""
        app = FastAPI(title="vllm-spec router", docs_url=None, redoc_url=None, openapi_url=None)
        app.include_router(self.router())
        return app


class Relay(StreamingResponse):
    """A live answer, closed also when the client leaves before or while it comes."""

    def __init__(self, live: Live, headers: Mapping[str, str]) -> None:
        super().__init__(live, headers=headers, media_type="text/event-stream")
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._live.close()


async def _each(whole: Answered) -> AsyncIterator[bytes]:
    for chunk in whole.chunks():
        yield chunk


def parsed(body: bytes) -> Any:
    """JSON as RFC 8259 has it, without Python's NaN and Infinity. Raises RequestError."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(body, parse_constant=refuse)
    except ValueError as error:
        raise RequestError("the request's body is not JSON") from error


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answered | Live]) -> Answered | Live:
    """The result of `work`, which is cancelled when the client closes the connection. Raises Gone then."""
    task = asyncio.create_task(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait({task, leaving})
    if task.cancelled():
        raise Gone("the client closed the connection")
    return task.result()


def refusal(error: Exception) -> Response:
    """The response for an error; one that is not expected is logged and not shown."""
    message, headers = str(error), {}
    if isinstance(error, RequestError):
        status, kind = 400, "invalid_request_error"
    elif isinstance(error, Refused):
        status, kind = error.status, "invalid_request_error"
    elif isinstance(error, Unauthorized):
        status, kind = 401, "authentication_error"
    elif isinstance(error, NoSuchModel):
        status, kind = 404, "not_found_error"
    elif isinstance(error, Gone):
        status, kind = 499, "client_closed_request"  # nobody reads it
    elif isinstance(error, OverBudget):
        status, kind = 429, "insufficient_quota"
    elif isinstance(error, Busy | StageFailed):
        status, kind = (429, "overloaded") if isinstance(error, Busy) else (503, "upstream_error")
        headers = {"Retry-After": str(math.ceil(error.retry_after))}
    else:
        logger.error("a request failed", exc_info=error)
        status, kind, message = 500, "internal_error", "the router failed; its log says why"
    return JSONResponse(failure(message, kind, status), status, headers=headers)
