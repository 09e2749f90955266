# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive over time, sent to real servers: the same trace to each in turn, all rounds."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from openai import APIError
from rich.table import Table

from vllm_spec_plugins.tools.report import spread
from vllm_spec_plugins.tools.server import MODEL, Server, ServerError, only
from vllm_spec_plugins.tools.speed import Configuration
from vllm_spec_plugins.tools.traces import Arrival

_HELD = re.compile(r"Cohorts: (\d+) requests were held, the longest (\d+) of at most (\d+) steps")


@dataclass(frozen=True)
class Reply:
    """When a request's first and last token came, in seconds from its arrival."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Held:
    """What a server's log says of its cohorts: requests held, and the longest of them in steps, of at most `bound`."""

    requests: int
    longest: int
    bound: int

    @classmethod
    def read(cls, log: str) -> Held | None:
        """All of a log together; None where it has none."""
        found = [tuple(map(int, match)) for match in _HELD.findall(log)]
        return cls(sum(f[0] for f in found), max(f[1] for f in found), found[-1][2]) if found else None


@dataclass
class Row:
    """One line of the table: a configuration, with a figure per round.

    Attributes:
        tokens_per_second: tokens received by the time from the first arrival to the last token.
        first_token_median, first_token_p99: seconds from arrival.
        per_token: mean over the requests of the seconds between two tokens.
        ratio: tokens per second to the first configuration's of the same round.
    """

    configuration: str
    tokens_per_second: list[float] = field(default_factory=list)
    first_token_median: list[float] = field(default_factory=list)
    first_token_p99: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    held: Held | None = None

    def enter(self, trace: Sequence[Arrival], replies: Sequence[Reply]) -> None:
        """The figures of one round."""
        end = max(arrival.seconds + reply.last for arrival, reply in zip(trace, replies, strict=True))
        first = [reply.first for reply in replies]
        between = [(reply.last - reply.first) / (reply.tokens - 1) for reply in replies if reply.tokens > 1]
        self.tokens_per_second.append(sum(reply.tokens for reply in replies) / (end - trace[0].seconds))
        self.first_token_median.append(median(first))
        self.first_token_p99.append(float(np.percentile(first, 99)))
        self.per_token.append(mean(between) if between else 0.0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cut_prompts(model: Path | str, texts: Path, trace: Sequence[Arrival], seed: int) -> list[list[int]]:
    """A prompt for each arrival, token ids of its length, cut from a file of prompts at places drawn from `seed`.

    Raises ValueError when the file has fewer tokens than the longest prompt.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line)["prompt"] for line in texts.read_text(encoding="utf-8").splitlines()]
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    if (longest := max(arrival.prompt for arrival in trace)) > len(tokens):
        raise ValueError(f"{texts} has {len(tokens)} tokens; a prompt of {longest} was asked for")
    rng = np.random.default_rng(seed)
    starts = [int(rng.integers(len(tokens) - arrival.prompt + 1)) for arrival in trace]
    return [tokens[start : start + arrival.prompt] for start, arrival in zip(starts, trace, strict=True)]


def send(server: Server, trace: Sequence[Arrival], prompts: Sequence[Sequence[int]]) -> list[Reply]:
    """Send each request at its time, greedy and of its length whatever the model says.

    Raises ServerError when a request fails or is answered with another number of tokens.
    """
    try:
        replies = asyncio.run(_send(server, trace, prompts))
    except APIError as error:
        raise ServerError(f"server {server.name}: {error}; {server.tail()}") from error
    for arrival, reply in zip(trace, replies, strict=True):
        if reply.tokens != arrival.output:
            raise ServerError(f"server {server.name} answered with {reply.tokens} tokens, not {arrival.output}")
    return replies


async def _send(server: Server, trace: Sequence[Arrival], prompts: Sequence[Sequence[int]]) -> list[Reply]:
    async with server.async_client() as client:

        async def complete(arrival: Arrival, prompt: Sequence[int]) -> Reply:
            await asyncio.sleep(start + arrival.seconds - time.perf_counter())
            stream = await client.completions.create(
                model=MODEL,
                prompt=list(prompt),
                temperature=0.0,
                max_tokens=arrival.output,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            first = last = float("nan")
            tokens = 0
            async for part in stream:
                now = time.perf_counter() - start - arrival.seconds
                if part.choices:
                    first, last = (now if first != first else first), now
                if part.usage is not None:
                    tokens = part.usage.completion_tokens
            return Reply(first, last, tokens)

        await client.models.list()  # the connection stands before the clock starts
        start = time.perf_counter()
        return await asyncio.gather(*map(complete, trace, prompts))


def measure(
    configurations: Sequence[Configuration],
    servers: Sequence[Server],
    trace: Sequence[Arrival],
    prompts: Sequence[Sequence[int]],
    rounds: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Send the trace to each of the running `servers` in turn, `rounds` times, every second round in reverse order.

    A few requests at once come first as a warm-up and are not counted.
    """
    pairs = list(zip(configurations, servers, strict=True))
    rows = {c.name: Row(c.name) for c in configurations}
    few = [Arrival(0.0, arrival.prompt, min(arrival.output, 16)) for arrival in trace[:4]]
    for _, server in pairs:
        with only(server, servers):
            send(server, few, prompts[:4])
    for number in range(rounds):
        for configuration, server in pairs[:: 1 if number % 2 == 0 else -1]:
            with only(server, servers):
                rows[configuration.name].enter(trace, send(server, trace, prompts))
        base = rows[configurations[0].name].tokens_per_second[-1]
        for row in rows.values():
            row.ratio.append(row.tokens_per_second[-1] / base)
        say(f"round {number + 1} of {rounds}: done")
    for configuration, server in pairs:
        rows[configuration.name].held = Held.read(server.log.read_text(errors="replace"))
    return list(rows.values())


def table(rows: Sequence[Row], title: str) -> Table:
    """Medians of the rounds (least to most)."""
    caption = f"ratio: tokens/s to `{rows[0].configuration}` in the same round; first token: seconds from arrival"
    made = Table(title=title, caption=caption, caption_justify="left")
    for name in ("server", "tokens/s", "ratio", "first token, median", "p99", "ms per token", "longest held"):
        made.add_column(name, justify="left" if name == "server" else "right")
    for row in rows:
        held = "" if row.held is None else f"{row.held.longest} of {row.held.bound} steps"
        made.add_row(
            row.configuration,
            spread(row.tokens_per_second, 1),
            spread(row.ratio, 2),
            spread(row.first_token_median, 2),
            spread(row.first_token_p99, 2),
            spread([seconds * 1e3 for seconds in row.per_token], 1),
            held,
        )
    return made
