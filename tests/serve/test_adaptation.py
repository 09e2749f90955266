# SPDX-License-Identifier: Apache-2.0
"""A server with the plugin's default settings, which leave drafts out where they do not pay: what comes, goes, and is silent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import httpx

from vllm_spec_plugins.tools.load import GREEDY, Reply, Sampling, send
from vllm_spec_plugins.tools.server import MODEL, Counters, Server

Wanted = Callable[..., tuple[Reply, ...]]
SEEDED = Sampling("T=0.8, seeds", 0.8, seed=21)
TOKENS = 64
IDLE = 1.5  # seconds


def streams(
    server: Server, prompts: list[str], sampling: Sampling, rng: random.Random
) -> tuple[list[list[int]], list[bool]]:
    """All prompts as streams that begin one after the other and ask for texts of all lengths; every third is given up.

    Returns what each has received, and whether it was read to its end.
    """
    plan = [
        (rng.uniform(0.0, 1.5), rng.randint(1, TOKENS), i % 3 == 2 and rng.randint(1, 12)) for i in range(len(prompts))
    ]

    async def run() -> list[tuple[list[int], bool]]:
        async with server.async_client() as client:

            async def one(index: int) -> tuple[list[int], bool]:
                delay, most, enough = plan[index]
                await asyncio.sleep(delay)
                request: dict[str, Any] = {"max_tokens": TOKENS if enough else most, **sampling.parameters(index)}
                extra = {"return_token_ids": True, "ignore_eos": True}
                tokens: list[int] = []
                async with await client.completions.create(
                    model=MODEL, prompt=prompts[index], stream=True, extra_body=extra, **request
                ) as chunks:
                    async for chunk in chunks:
                        for choice in chunk.choices:
                            tokens += (choice.model_extra or {}).get("token_ids") or ()
                        if enough and len(tokens) >= enough:
                            return tokens, False
                assert len(tokens) == request["max_tokens"]
                return tokens, True

            return list(await asyncio.gather(*(one(i) for i in range(len(prompts)))))

    received = asyncio.run(run())
    return [tokens for tokens, _ in received], [whole for _, whole in received]


def running(server: Server) -> float:
    """Requests that the server has, running or waiting."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def test_streams_that_come_go_and_are_given_up_around_silence_carry_plain_decodings_text(
    plain: Server, none: Server, adapting: Server, prompts: list[str], wanted: Wanted, seed: int
) -> None:
    rng, unbound = random.Random(seed), {"ignore_eos": True}
    references = {GREEDY: plain, SEEDED: none}
    expected = {sampling: wanted(server, 12, sampling, TOKENS, unbound) for sampling, server in references.items()}
    before = adapting.counters()
    for sampling in (GREEDY, SEEDED, GREEDY):
        received, whole = streams(adapting, prompts, sampling, rng)
        for tokens, reply in zip(received, expected[sampling], strict=True):
            assert tokens == list(reply.token_ids[: len(tokens)])
        assert whole.count(False) >= 3
        time.sleep(IDLE)
        assert running(adapting) == 0
    told = adapting.counters() - before
    assert 0 < told.accepted <= told.draft_tokens, "not even the first drafts were given a chance"

    # After the silence, one at a time and together: each answer, and figures that fit it.
    for concurrency in (1, 8):
        batch = send(adapting, prompts, GREEDY, TOKENS, concurrency, extra=unbound)
        assert batch.replies == expected[GREEDY]
        _fits(batch.counters, len(prompts) * TOKENS)


def _fits(counters: Counters, generated: int) -> None:
    assert counters.generated == generated
    assert 0 <= counters.accepted <= counters.draft_tokens
    # Every step yields a token and what was accepted, of which the last step of a request may lose some.
    assert counters.steps <= generated <= counters.steps + counters.accepted
