# SPDX-License-Identifier: Apache-2.0
"""The comparison of configurations on the same prompts: all servers up, one at a time at work, rounds in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from vllm_spec_plugins.tools.load import Batch, Sampling, send
from vllm_spec_plugins.tools.server import Counters, Server, only

PLAIN, NONE = "vllm serve", "--plugin none"


@dataclass(frozen=True)
class Configuration:
    """One way to serve.

    Attributes:
        name: as in the tables.
        arguments: what it adds to the command line.
        sampled: whether its sampled output can be compared at all.
    """

    name: str
    arguments: tuple[str, ...]
    sampled: bool = True

    @property
    def plain(self) -> bool:
        """Whether it decodes without speculation: the faster of these is what the others are measured against."""
        return self.name in (PLAIN, NONE)


def plain() -> list[Configuration]:
    """vLLM as it comes, and the same runner as the plugins' without speculation."""
    return [Configuration(PLAIN, ()), Configuration(NONE, ("--plugin", "none"))]


def plugin(spec: str) -> Configuration:
    """A plugin, or several with `` & `` between them that share one server."""
    return Configuration(f"--plugin {spec}", ("--plugin", spec))


def vllm_ngram(drafts: int = 4, longest: int = 4) -> Configuration:
    """vLLM's own prompt lookup, `drafts` tokens after a match of up to `longest`."""
    return _vllm("ngram", {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": longest})


def vllm_medusa(heads: str, drafts: int = 4) -> Configuration:
    """vLLM's own chain of the best token of each of the first `drafts` heads."""
    return _vllm("medusa", {"method": "medusa", "model": heads, "num_speculative_tokens": drafts})


def vllm_draft(model: str, drafts: int = 4) -> Configuration:
    """vLLM's own chain of `drafts` tokens from a draft model."""
    return _vllm("draft_model", {"method": "draft_model", "model": model, "num_speculative_tokens": drafts})


def _vllm(name: str, config: dict[str, object]) -> Configuration:
    # On a CPU the sampled text is wrong: the uniform numbers and temperatures of its rejection sampler stay unset.
    return Configuration(f"vLLM's {name}", ("--speculative-config", json.dumps(config)), sampled=False)


def serve(
    configurations: Sequence[Configuration],
    model: Path | str,
    arguments: Sequence[str],
    logs: Path,
    threads: int | None,
) -> list[Server]:
    """A server per configuration, not started.

    Args:
        arguments: for every server alike; they stand behind the configuration's own.
        logs: folder for the logs.
        threads: OpenMP threads of each worker, sleeping while they wait; None = as the environment says.
    """
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return [
        Server(c.name, model, [*c.arguments, *arguments], logs / f"{number}.log", environment)
        for number, c in enumerate(configurations)
    ]


@dataclass
class Row:
    """One line of the table: a configuration under one load, over all rounds.

    Attributes:
        identical: reference's name -> completions equal to the reference's, out of `prompts`, in the worst round.
        tokens_per_second: one figure per round.
        ratio: to the faster plain configuration of the same round.
    """

    configuration: str
    sampling: str
    concurrency: int
    prompts: int
    identical: dict[str, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    tokens_per_second: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return {
            "configuration": self.configuration,
            "sampling": self.sampling,
            "concurrency": self.concurrency,
            "prompts": self.prompts,
            "identical": self.identical,
            "tokens_per_step": self.counters.tokens_per_step,
            "generated": self.counters.generated,
            "steps": self.counters.steps,
            "drafts": self.counters.drafts,
            "draft_tokens": self.counters.draft_tokens,
            "accepted": self.counters.accepted,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_median": median(self.tokens_per_second),
            "ratio": self.ratio,
            "ratio_median": median(self.ratio),
        }

    @property
    def lossless(self) -> bool:
        """Whether every completion equalled every reference's."""
        return all(same == self.prompts for same in self.identical.values())


def references(configuration: Configuration, sampling: Sampling, present: Sequence[str]) -> list[str]:
    """Which configurations' output this one must equal. Plain vLLM draws other noise from a seed than the V2 runner."""
    names = [PLAIN, NONE] if sampling.temperature == 0 else [NONE]
    return [n for n in names if n in present and n != configuration.name and configuration.name != PLAIN]


def measure(
    configurations: Sequence[Configuration],
    servers: Sequence[Server],
    prompts: Sequence[str],
    *,
    samplings: Sequence[Sampling],
    concurrencies: Sequence[int],
    max_tokens: int,
    rounds: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Send `prompts` to each of the running `servers` in turn, `rounds` times, every second round in reverse order.

    A warm-up with every load comes first and is not counted.
    """
    rows: list[Row] = []
    for sampling in samplings:
        taking_part = [
            (c, s) for c, s in zip(configurations, servers, strict=True) if c.sampled or not sampling.temperature
        ]
        for concurrency in concurrencies:
            say(f"{sampling.name}, {concurrency} at a time")

            def run(server: Server, prompts: Sequence[str]) -> Batch:
                with only(server, servers):
                    return send(server, prompts, sampling, max_tokens, concurrency)  # noqa: B023 (called at once)

            for _, server in taking_part:
                run(server, prompts[: max(2, concurrency)])
            lines = {c.name: Row(c.name, sampling.name, concurrency, len(prompts)) for c, _ in taking_part}
            for number in range(rounds):
                batches = {c.name: run(s, prompts) for c, s in taking_part[:: 1 if number % 2 == 0 else -1]}
                _enter(taking_part, sampling, batches, lines)
            rows.extend(lines.values())
    return rows


def _enter(
    taking_part: Sequence[tuple[Configuration, Server]],
    sampling: Sampling,
    batches: dict[str, Batch],
    lines: dict[str, Row],
) -> None:
    """One round's figures into the rows."""
    fastest_plain = max(batches[c.name].tokens_per_second for c, _ in taking_part if c.plain)
    for configuration, _ in taking_part:
        batch, row = batches[configuration.name], lines[configuration.name]
        row.counters += batch.counters
        row.tokens_per_second.append(batch.tokens_per_second)
        row.ratio.append(batch.tokens_per_second / fastest_plain)
        for reference in references(configuration, sampling, list(batches)):
            same = batch.same_as(batches[reference])
            row.identical[reference] = min(same, row.identical.get(reference, same))
