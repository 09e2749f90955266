# SPDX-License-Identifier: Apache-2.0
"""Upstreams that answer, refuse, hang and break as a test tells them, behind httpx's mock transport."""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx

from vllm_spec_plugins.cascade import config
from vllm_spec_plugins.tools.router.service import Service

# What an upstream does with a call: answer | its HTTP status | "hang" | "drop" (the connection breaks, after a piece where
# it streams) | "short" (the stream ends without its end) | "abort" (finish_reason) | "error" (an error event).
Behaviour = str | int


class Pieces(httpx.AsyncByteStream):
    """A body in pieces; `error` breaks the connection behind the last."""

    def __init__(self, pieces: list[bytes], error: bool = False, wait: asyncio.Event | None = None) -> None:
        self._pieces, self._error, self._wait = pieces, error, wait
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._wait is not None:
            await self._wait.wait()
        if self._error:
            raise httpx.ReadError("the connection broke")

    async def aclose(self) -> None:
        self.closed = True


class Fakes:
    """A transport for all upstreams of a test, by host name.

    Attributes:
        behaviour: host -> what its next calls do, the last one for ever.
        text, chance: host -> its answer (or prompt -> answer), and the probability of each of its two tokens.
        calls: (host, request) of every call but health checks.
    """

    def __init__(self) -> None:
        self.behaviour: dict[str, list[Behaviour]] = defaultdict(lambda: ["answer"])
        self.text: dict[str, str | Callable[[dict[str, Any]], str]] = defaultdict(lambda: "text")
        self.chance: dict[str, float] = defaultdict(lambda: 0.9)
        self.calls: list[tuple[str, httpx.Request]] = []
        self.healthy: dict[str, bool] = defaultdict(lambda: True)
        self.go = asyncio.Event()
        self.running: dict[str, int] = defaultdict(int)
        self.most: dict[str, int] = defaultdict(int)
        self.bodies: list[Pieces] = []
        self.transport = httpx.MockTransport(self._serve)

    def hosts(self) -> list[str]:
        return [host for host, _ in self.calls]

    async def _serve(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if request.url.path == "/health":
            return httpx.Response(200 if self.healthy[host] else 503)
        self.calls.append((host, request))
        if request.url.path == "/score":
            return httpx.Response(200, json={"score": 0.9})
        self.running[host] += 1
        self.most[host] = max(self.most[host], self.running[host])
        try:
            return await self._answer(host, request)
        finally:
            self.running[host] -= 1

    async def _answer(self, host: str, request: httpx.Request) -> httpx.Response:
        planned = self.behaviour[host]
        what = planned.pop(0) if len(planned) > 1 else planned[0]
        body = json.loads(request.content)
        await asyncio.sleep(0)
        if what == "hang" and not body.get("stream"):
            await self.go.wait()
        if isinstance(what, int):
            return httpx.Response(
                what, json={"error": {"message": f"status {what} for {request.headers.get('authorization')}"}}
            )
        if body.get("stream"):
            return httpx.Response(200, stream=self._stream(host, body, str(what), request.url.path))
        if what == "drop":
            raise httpx.RemoteProtocolError("server disconnected")
        return httpx.Response(
            200, json=self._whole(host, body, "abort" if what == "abort" else "stop", request.url.path)
        )

    def _say(self, host: str, body: dict[str, Any]) -> str:
        text = self.text[host]
        return text if isinstance(text, str) else text(body)

    def _whole(self, host: str, body: dict[str, Any], reason: str, path: str) -> dict[str, Any]:
        logprob, text = math.log(self.chance[host]), self._say(host, body)
        choices = []
        for index in range(body.get("n") or 1):
            choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
            if "chat" in path:
                choice["message"] = {"role": "assistant", "content": text, "tool_calls": []}
                if body.get("logprobs"):
                    choice["logprobs"] = {"content": [{"token": "x", "logprob": logprob, "top_logprobs": []}] * 2}
            else:
                choice["text"] = text
                if body.get("logprobs") is not None:
                    choice["logprobs"] = {"token_logprobs": [logprob] * 2}
            choices.append(choice)
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return {"id": f"at-{host}", "model": body["model"], "created": 7, "choices": choices, "usage": usage}

    def _stream(self, host: str, body: dict[str, Any], what: str, path: str) -> Pieces:
        frame = {"id": f"at-{host}", "model": body["model"], "created": 7}
        chunks: list[Any] = []
        if "chat" in path:
            chunks.append(
                {
                    **frame,
                    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
                }
            )
        for piece in self._say(host, body).split(" "):
            key = {"delta": {"content": piece}} if "chat" in path else {"text": piece}
            chunks.append({**frame, "choices": [{"index": 0, **key, "finish_reason": None}]})
        reason = "abort" if what == "abort" else "stop"
        end = {"delta": {}} if "chat" in path else {"text": ""}
        tail = [{**frame, "choices": [{"index": 0, **end, "finish_reason": reason}]}]
        tail += [{**frame, "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}}]
        head = [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks]
        rest = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in tail]
        done = b"data: [DONE]\n\n"
        if what == "drop first":
            made = Pieces([], error=True)
        elif what == "error first":
            made = Pieces(
                [head[0] if "chat" in path else b"", b'data: {"error": {"message": "engine died"}}\n\n', done]
            )
        elif what == "drop":
            made = Pieces(head, error=True)
        elif what == "short":
            made = Pieces([*head, rest[0]])
        elif what == "no end":
            made = Pieces([*head, rest[1], done])
        elif what == "error":
            made = Pieces([*head, b'data: {"error": {"message": "engine died"}}\n\n', done])
        elif what == "hang":
            made = Pieces(head, wait=self.go)
        else:
            made = Pieces([*head, *rest, done])
        self.bodies.append(made)
        return made


def settings(**changes: Any) -> config.CascadeSettings:
    """Two stages, small (prices 1 and 2) and large (10 and 20), the large one on two servers; quick retries."""
    held = changes.pop("large", {})
    small = changes.pop("small", {})
    whole: dict[str, Any] = {
        "stages": [
            {
                "name": "small",
                "model": "s",
                "input_price": 1,
                "output_price": 2,
                "upstreams": [{"url": "http://small"}],
                **small,
            },
            {
                "name": "large",
                "model": "l",
                "input_price": 10,
                "output_price": 20,
                "upstreams": [{"url": "http://large1"}, {"url": "http://large2"}],
                **held,
            },
        ],
        "policy": {"kind": "confidence"},
        "retry": {"backoff": 0.0},
        **changes,
    }
    return config.parse(whole)


class Client:
    """Requests to a router, in process."""

    def __init__(self, service: Service, http: httpx.AsyncClient) -> None:
        self.service, self._http = service, http

    async def post(self, path: str, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self._http.post(path, json=body, headers=headers)

    async def send(self, path: str, content: bytes) -> httpx.Response:
        return await self._http.post(path, content=content)

    async def chat(self, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        base = {"model": "cascade", "messages": [{"role": "user", "content": "hi"}]}
        return await self.post("/v1/chat/completions", headers, **{**base, **body})

    async def complete(self, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", headers, **{"model": "cascade", "prompt": "hi", **body})

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return await self._http.get(path, headers=headers)


def routed(
    test: Callable[[Client, Fakes], Any],
    environment: Mapping[str, str] | None = None,
    **changes: Any,
) -> None:
    """Run `test` against a router over fakes; `changes`: of `settings`."""

    async def run() -> None:
        fakes = Fakes()
        service = Service(
            settings(**changes),
            environment=environment or {},
            transport=fakes.transport,
        )
        async with (
            service.running(),
            httpx.AsyncClient(transport=httpx.ASGITransport(service.app()), base_url="http://router") as http,
        ):
            await test(Client(service, http), fakes)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, however busy the machine is; a test's own time limit ends what never comes."""
    while not condition():
        await asyncio.sleep(0.002)


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream; [DONE] as text."""
    found = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


def streamed(response: httpx.Response) -> str:
    """The text of a stream of either kind."""
    choices = [c for event in events(response) if isinstance(event, dict) for c in event.get("choices", ())]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
