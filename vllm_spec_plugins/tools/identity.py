# SPDX-License-Identifier: Apache-2.0
"""Is the output plain vLLM's, token for token? Many prompts through real servers, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from vllm_spec_plugins.tools.load import GREEDY, Batch, Sampling, send
from vllm_spec_plugins.tools.server import Server, only
from vllm_spec_plugins.tools.speed import PLAIN, Configuration, references

SAMPLED = Sampling("T=0.8, top-p 0.9, seeds", 0.8, top_p=0.9, seed=1000)


@dataclass(frozen=True)
class Comparison:
    """One configuration's completions beside a reference's.

    Attributes:
        differing: (prompt's index, first differing token's index) of every completion that is not the same.
    """

    configuration: str
    reference: str
    sampling: str
    prompts: int
    tokens: int
    tokens_per_step: float
    differing: tuple[tuple[int, int], ...]

    @property
    def identical(self) -> int:
        return self.prompts - len(self.differing)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "identical": self.identical}


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first token that differs, or of the end of the shorter one."""
    pairs = enumerate(zip_longest(mine, theirs))
    return next((index for index, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def compare(name: str, reference: str, sampling: Sampling, mine: Batch, theirs: Batch) -> Comparison:
    pairs = enumerate(zip(mine.replies, theirs.replies, strict=True))
    differing = ((i, first_difference(a.token_ids, b.token_ids)) for i, (a, b) in pairs if a != b)
    return Comparison(
        configuration=name,
        reference=reference,
        sampling=sampling.name,
        prompts=len(mine.replies),
        tokens=mine.counters.generated,
        tokens_per_step=mine.counters.tokens_per_step,
        differing=tuple(differing),
    )


def check(
    configurations: Sequence[Configuration],
    servers: Sequence[Server],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    concurrency: int,
    say: Callable[[str], None],
) -> list[Comparison]:
    """Every configuration against its references: greedy ones against both plain runners, sampled ones against the same."""
    found = []
    for sampling in (GREEDY, SAMPLED):
        batches: dict[str, Batch] = {}
        for configuration, server in zip(configurations, servers, strict=True):
            if sampling.temperature and configuration.name == PLAIN:
                continue  # nothing is compared with it
            say(f"{sampling.name}: {configuration.name}")
            with only(server, servers):
                batches[configuration.name] = send(server, prompts, sampling, max_tokens, concurrency)
        for configuration in configurations:
            if configuration.name in batches:
                for reference in references(configuration, sampling, list(batches)):
                    mine, theirs = batches[configuration.name], batches[reference]
                    found.append(compare(configuration.name, reference, sampling, mine, theirs))
    return found
