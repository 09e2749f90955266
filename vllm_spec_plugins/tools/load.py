# SPDX-License-Identifier: Apache-2.0
"""Prompts, the requests made of them, and what comes back: the same for every measurement."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError

from vllm_spec_plugins.tools.server import MODEL, Counters, Server, ServerError

# In a checkout; an installed package has neither and asks for --model and --prompts-file.
_MODELS = Path(__file__).resolve().parents[2] / "tests" / "models"
TARGET, PROMPTS = _MODELS / "target", _MODELS / "heldout_prompts.jsonl"


@dataclass(frozen=True)
class Sampling:
    """How the requests of one table row are sampled; `seed`: request i gets seed + i, None = no seeds."""

    name: str
    temperature: float
    top_p: float = 1.0
    seed: int | None = None

    def parameters(self, index: int) -> dict[str, Any]:
        """Fields of the request number `index`."""
        seed = {} if self.seed is None else {"seed": self.seed + index}
        return {"temperature": self.temperature, "top_p": self.top_p, **seed}


GREEDY = Sampling("greedy", 0.0)
SAMPLED = Sampling("T=0.8, seeds", 0.8, seed=1000)


@dataclass(frozen=True)
class Reply:
    """One completion: its tokens, its text and why it ended."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Batch:
    """What one server did with one list of prompts: `seconds` of wall-clock time from first request to last answer."""

    replies: tuple[Reply, ...]
    seconds: float
    counters: Counters = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.counters.generated / self.seconds

    def same_as(self, other: Batch) -> int:
        """How many completions equal the other's, token for token."""
        return sum(mine == theirs for mine, theirs in zip(self.replies, other.replies, strict=True))


def load_prompts(path: Path, count: int) -> list[str]:
    """The first `count` prompts of a JSON-lines file with a "prompt" per line. Raises ValueError when it has fewer."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines)} prompts, {count} were asked for")
    return [json.loads(line)["prompt"] for line in lines[:count]]


def send(
    server: Server,
    prompts: Sequence[str],
    sampling: Sampling,
    max_tokens: int,
    concurrency: int,
    extra: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> Batch:
    """Complete every prompt, at most `concurrency` at a time. The replies stand in the order of the prompts.

    Args:
        extra: further fields for every request's body, or for each one's; with "n", each prompt has as many replies.

    Raises ServerError when a request fails, or the metrics and the answers disagree on the number of tokens.
    """
    each = [extra or {}] * len(prompts) if extra is None or isinstance(extra, Mapping) else extra
    requests = list(zip(prompts, each, strict=True))
    before = server.counters()
    try:
        replies, seconds = asyncio.run(_send(server, requests, sampling, max_tokens, concurrency))
    except APIError as error:
        raise ServerError(f"server {server.name}: {error}; {server.tail()}") from error
    received = sum(len(reply.token_ids) for reply in replies)
    counters = server.counters() - before
    if counters.generated != received:
        raise ServerError(f"server {server.name} counted {counters.generated} tokens and sent {received}")
    return Batch(tuple(replies), seconds, counters)


async def _send(
    server: Server,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    sampling: Sampling,
    max_tokens: int,
    concurrency: int,
) -> tuple[list[Reply], float]:
    free = asyncio.Semaphore(concurrency)

    async with server.async_client() as client:

        async def complete(index: int, prompt: str, extra: Mapping[str, Any]) -> list[Reply]:
            async with free:
                completion = await client.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    extra_body={"return_token_ids": True, "max_tokens": max_tokens, **extra},
                    **sampling.parameters(index),
                )
            return [
                Reply(tuple((choice.model_extra or {})["token_ids"]), choice.text, choice.finish_reason)
                for choice in completion.choices
            ]

        await client.models.list()  # the connection stands before the clock starts
        start = time.perf_counter()
        replies = await asyncio.gather(*(complete(i, *request) for i, request in enumerate(requests)))
        seconds = time.perf_counter() - start
        return [reply for answer in replies for reply in answer], seconds
