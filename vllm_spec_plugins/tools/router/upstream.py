# SPDX-License-Identifier: Apache-2.0
"""One vLLM server behind the router: its connections, its key, its queue, its health."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from vllm_spec_plugins.cascade.breaker import Breaker
from vllm_spec_plugins.cascade.config import HealthSettings, UpstreamSettings
from vllm_spec_plugins.tools.router.network import Network

logger = logging.getLogger(__name__)

DONE = b"[DONE]"

# An answer of the upstream that is about the request: it goes to the client as it is. The others are about the upstream.
ABOUT_THE_REQUEST = (400, 413, 415, 422)


class CallFailed(Exception):
    """A call that brought no whole answer. Another upstream may do better."""


class Busy(Exception):
    """A queue is full, or the wait in it was too long."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(Exception):
    """The upstream will not have this request; neither would another."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Upstream:
    """A client for one server, which alone holds that server's key: no other connection can carry it.

    Neither proxies nor .netrc are read from the environment, and redirects are not followed, so the key goes nowhere else.

    Args:
        key: sent as a bearer token; None for none.
        transport: stands in for the network in tests.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        key: str | None,
        health: HealthSettings,
        timeout: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name, self.healthy = settings.title, True
        self.running = self.waiting = 0
        self._key, self._settings, self._health = key, settings, health
        self._places = asyncio.Semaphore(settings.max_concurrency)
        self._breaker = Breaker(health.failures, health.cooldown)
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=health.connect_timeout),
            # One more for the health checks. Idle connections go before vLLM closes them, after 5 seconds.
            transport=transport
            or Network(
                limits=httpx.Limits(max_connections=settings.max_concurrency + 1, keepalive_expiry=2.0), trust_env=False
            ),
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"Upstream({self.name})"

    @property
    def available(self) -> bool:
        return self.healthy and self._breaker.allows

    @property
    def load(self) -> float:
        """Requests here per place."""
        return (self.running + self.waiting) / self._settings.max_concurrency

    @property
    def retry_after(self) -> float:
        """Seconds until this upstream may be available again."""
        return max(1.0, self._breaker.wait, 0.0 if self.healthy else self._health.interval)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for one of the `max_concurrency` places. Raises Busy, and CallFailed when the upstream went down meanwhile."""
        if self._places.locked() and self.waiting >= self._settings.max_queue:
            raise Busy(f"upstream {self.name} has {self.waiting} requests waiting, its limit", 1.0)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._health.queue_timeout):
                await self._places.acquire()
        except TimeoutError as error:
            raise Busy(f"upstream {self.name} had no place within {self._health.queue_timeout:g} s", 1.0) from error
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            if not self.available:
                raise CallFailed(f"upstream {self.name} went down while the request waited")
            with self._judged():
                yield
        finally:
            self.running -= 1
            self._places.release()

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """Every call tells the breaker how it went."""
        self._breaker.begin()
        try:
            yield
        except CallFailed:
            self._breaker.failed()
            raise
        except BaseException:
            self._breaker.abandoned()
            raise
        self._breaker.succeeded()

    async def post(self, path: str, body: dict[str, Any], attempt: str) -> Any:
        """The JSON of a whole reply. Raises CallFailed or Refused."""
        try:
            response = await self._client.post(path, **_sent(body, attempt))
            self._check(response)
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._failure(error) from error

    @contextlib.asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any], attempt: str) -> AsyncIterator[AsyncIterator[Any]]:
        """The chunks of a reply, parsed, until its [DONE]. Raises CallFailed, also from the chunks, or Refused."""
        try:
            async with self._client.stream("POST", path, **_sent(body, attempt)) as response:
                if response.status_code != 200:
                    await response.aread()
                self._check(response)
                yield self._chunks(response)
        except httpx.HTTPError as error:
            raise self._failure(error) from error

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[Any]:
        try:
            async for data in events(response.aiter_bytes()):
                if data == DONE:
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise CallFailed(
                        f"upstream {self.name} ended its stream with an error: {self._clean(chunk['error'])}"
                    )
                yield chunk
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise self._failure(error) from error
        raise CallFailed(f"upstream {self.name} ended its stream before [DONE]")

    def _check(self, response: httpx.Response) -> None:
        if response.status_code in ABOUT_THE_REQUEST:
            raise Refused(self._clean(_message(response)), response.status_code)
        if response.status_code != 200:
            raise CallFailed(f"upstream {self.name} answered with status {response.status_code}")

    def _failure(self, error: Exception) -> CallFailed:
        return CallFailed(f"upstream {self.name}: {type(error).__name__}: {self._clean(error)}".rstrip(": "))

    def _clean(self, text: object) -> str:
        """Whatever the upstream wrote, without its key."""
        return str(text).replace(self._key, "***") if self._key else str(text)

    async def check(self) -> None:
        """Ask for its health once. To pass after a failure also lets calls through again at once."""
        timeout = self._health.timeout
        try:
            passed = (await self._client.get("/health", timeout=timeout)).status_code == 200
            reason = "its /health failed"
        except httpx.HTTPError as error:
            passed, reason = False, str(self._failure(error))
        if passed and not self.healthy:
            self._breaker.succeeded()
            logger.info("upstream %s is up again", self.name)
        elif self.healthy and not passed:
            logger.warning("upstream %s is taken for down: %s", self.name, reason)
        self.healthy = passed

    async def watch(self) -> None:
        """Check for ever."""
        while True:
            await self.check()
            await asyncio.sleep(self._health.interval)

    async def close(self) -> None:
        await self._client.aclose()


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each as the OpenAI interface has them.

    By bytes: text may hold U+2028 and its like, at which `str.splitlines` and httpx's `aiter_lines` would cut.
    """
    held = b""
    async for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _sent(body: dict[str, Any], attempt: str) -> dict[str, Any]:
    """What httpx is given. In ASCII: a client may have escaped half a surrogate pair, which UTF-8 does not have."""
    headers = {"X-Request-Id": attempt, "Content-Type": "application/json"}
    return {"content": json.dumps(body).encode(), "headers": headers}


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500] or f"status {response.status_code}"
