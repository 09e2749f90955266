# SPDX-License-Identifier: Apache-2.0
"""A scorer of the user's own, over HTTP."""

from __future__ import annotations

import json

import httpx

from vllm_spec_plugins.tools.router.network import Network


class Unjudged(Exception):
    """An answer whose score could not be had."""


class HttpScorer:
    """POST {"question", "answer"} -> {"score": 0 to 1}."""

    def __init__(self, url: str, key: str | None, timeout: float, transport: httpx.AsyncBaseTransport | None = None):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._url = url
        transport = transport or Network(trust_env=False)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport, trust_env=False)

    async def score(self, question: str, answer: str) -> float:
        """Raises Unjudged when it does not say."""
        try:
            sent = json.dumps({"question": question, "answer": answer}).encode()
            response = await self._client.post(self._url, content=sent)
            response.raise_for_status()
            score = float(response.json()["score"])
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise Unjudged(f"the scorer gave no score ({type(error).__name__})") from error
        if not 0.0 <= score <= 1.0:
            raise Unjudged(f"the scorer gave {score:g}, which is not within 0 to 1")
        return score

    async def close(self) -> None:
        await self._client.aclose()
