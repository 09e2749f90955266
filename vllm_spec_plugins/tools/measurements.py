# SPDX-License-Identifier: Apache-2.0
"""What `vllm-spec bench` can measure.

Each measurement takes the arguments and a way to tell of progress, and returns figures, tables and whether what had to hold did.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_spec_plugins.tools import acceptance, arrivals, caching, cohorts, identity, report, traces
from vllm_spec_plugins.tools.load import GREEDY, SAMPLED, load_prompts
from vllm_spec_plugins.tools.server import Server, running
from vllm_spec_plugins.tools.speed import (
    NONE,
    Configuration,
    measure,
    plain,
    plugin,
    serve,
    vllm_draft,
    vllm_medusa,
    vllm_ngram,
)
from vllm_spec_plugins.tools.traces import Arrival

# fp32: in bf16 plain vLLM itself gives other tokens at another batch size.
ARGUMENTS = ("--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 28))


def speed(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Table], bool]:
    """Tokens per step and tokens/s of every configuration, greedy and sampled, at each concurrency."""
    configurations = [*plain(), *map(plugin, arguments.plugin)]
    if not arguments.no_ngram:
        configurations.append(vllm_ngram(arguments.ngram_drafts, arguments.ngram_longest))
    if arguments.vllm_medusa:
        configurations.append(vllm_medusa(arguments.vllm_medusa, arguments.vllm_drafts))
    if arguments.vllm_draft:
        configurations.append(vllm_draft(arguments.vllm_draft, arguments.vllm_drafts))
    prompts = load_prompts(arguments.prompts_file, arguments.prompts)
    servers = _servers(configurations, arguments, ARGUMENTS, say)
    with running(servers):
        rows = measure(
            configurations,
            servers,
            prompts,
            samplings=(GREEDY, SAMPLED),
            concurrencies=arguments.concurrency or [1, 8],
            max_tokens=arguments.max_tokens,
            rounds=arguments.rounds,
            say=say,
        )
    title = f"{arguments.model}, {len(prompts)} prompts, up to {arguments.max_tokens} tokens, {arguments.rounds} rounds"
    table = report.speed_table(rows, title)
    # vLLM's own methods are measured beside the plugins; what their output is worth is not this program's verdict.
    lossless = all(row.lossless for row in rows if row.configuration.startswith("--plugin"))
    return {"rows": [row.as_dict() for row in rows]}, [table], lossless


def check_identity(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table], bool]:
    """Greedy output against both plain runners', sampled output with seeds against the same runner's."""
    configurations = [*plain(), *map(plugin, arguments.plugin)]
    prompts = load_prompts(arguments.prompts_file, arguments.prompts)
    servers = _servers(configurations, arguments, ARGUMENTS, say)
    concurrency = arguments.concurrency[0] if arguments.concurrency else 8
    with running(servers):
        found = identity.check(
            configurations, servers, prompts, max_tokens=arguments.max_tokens, concurrency=concurrency, say=say
        )
    table = Table(title=f"{len(prompts)} prompts, up to {arguments.max_tokens} tokens, {concurrency} at a time")
    for name in ("requests", "server", "compared with", "identical", "tokens", "tokens per step"):
        table.add_column(name, justify="right" if name.startswith("tokens") else "left")
    for c in found:
        same = f"{c.identical} of {c.prompts}"
        table.add_row(c.sampling, c.configuration, c.reference, same, str(c.tokens), f"{c.tokens_per_step:.2f}")
    lossless = all(not c.differing for c in found if c.configuration != c.reference)
    return {"comparisons": [c.as_dict() for c in found]}, [table], lossless


def check_json(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Table], bool]:
    """Answers to JSON schemas: valid, and those of the same runner without speculation."""
    from vllm_spec_plugins.tools import constrained

    configurations = [plugin("none"), *map(plugin, arguments.plugin)]
    prompts = load_prompts(arguments.prompts_file, arguments.prompts)
    servers = _servers(configurations, arguments, [*ARGUMENTS, *constrained.ARGUMENTS], say)
    concurrency = arguments.concurrency[0] if arguments.concurrency else 8
    with running(servers):
        found = constrained.check(
            configurations, servers, prompts, max_tokens=arguments.max_tokens, concurrency=concurrency, say=say
        )
    table = Table(
        title=f"{len(prompts)} requests over {len(constrained.SCHEMAS)} JSON schemas, {concurrency} at a time",
        caption=f"identical: to `{NONE}`",
    )
    for name in ("requests", "server", "valid", "identical", "tokens", "tokens per step"):
        table.add_column(name, justify="right" if name.startswith("tokens") else "left")
    for o in found:
        valid, same = (f"{o.requests - len(wrong)} of {o.requests}" for wrong in (o.invalid, o.differing))
        table.add_row(o.sampling, o.configuration, valid, same, str(o.tokens), f"{o.tokens_per_step:.2f}")
    return {"outcomes": [o.as_dict() for o in found]}, [table], all(o.right for o in found)


def check_distribution(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table], bool]:
    """Unseeded samples against the model's exact probabilities."""
    from vllm_spec_plugins.tools import distribution

    model = distribution.ExactModel(arguments.model)
    reports, tables, sound = [], [], True
    for configuration in map(plugin, arguments.plugin):
        (server,) = _servers([configuration], arguments, [*distribution.ARGUMENTS, "--seed", str(arguments.seed)], say)
        with server:
            outcomes = distribution.check(server, model, arguments.samples, say)
        p, other, right = distribution.verdict(outcomes)
        sound &= right
        table = Table(
            title=f"{configuration.name}: first {distribution.LENGTH} tokens at T={distribution.TEMPERATURE}, "
            f"{arguments.samples} samples per prompt",
            caption=f"all prompts together: p = {p:.3f}; the same samples against T={distribution.OTHER_TEMPERATURE}: "
            f"p = {other:.1e}",
        )
        for name in ("prompt ends with", "groups", "chi-square", "p", "drafts accepted"):
            table.add_column(name, justify="left" if name.startswith("prompt") else "right")
        for o in outcomes:
            ending, statistic = repr(o.prompt[-24:]), f"{o.result.statistic:.1f}"
            accepted = f"{o.counters.accepted} of {o.counters.draft_tokens}"
            table.add_row(ending, str(o.groups), statistic, f"{o.result.p:.3f}", accepted)
        tables.append(table)
        prompts = [o.as_dict() for o in outcomes]
        reports.append(
            {"configuration": configuration.name, "p": p, "p_other": other, "sound": right, "prompts": prompts}
        )
    return {"distributions": reports}, tables, sound


def check_acceptance(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table], bool]:
    """Chance that the walk goes on, for random distributions."""
    lines = acceptance.measure(arguments.samples, arguments.seed, say=say)
    counts = " / ".join(map(str, acceptance.CHILDREN))
    table = Table(
        title=f"chance that the walk goes on with {counts} children, {acceptance.PAIRS} random (p, q) per line, "
        f"{arguments.samples} draws each, seed {arguments.seed}",
    )
    for name in ("vocabulary, similarity", "coupled children", "likeliest children of q", "1 - TV(p, q)"):
        table.add_column(name)
    for line in lines:
        shares = (" / ".join(f"{share:.3f}" for share in kind) for kind in (line.coupled, line.likeliest))
        table.add_row(f"{line.vocab}, {line.similarity}", *shares, f"{line.overlap:.3f}")
    return {"lines": [line.as_dict() for line in lines]}, [table], all(line.exact for line in lines)


def simulate_cohorts(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table], bool]:
    """Admission policies for SkipDecode, simulated."""
    cost = cohorts.StepCost.read(arguments.step_times) if arguments.step_times else cohorts.StepCost.fit()
    say(
        f"a step: {cost.fixed:.1f} ms + {cost.layer:.2f} per layer of its deepest row + {cost.row:.3f} per layer of each row"
    )
    wait, slots = arguments.cohort_wait, arguments.max_num_seqs
    loads, tables = [], []
    for load, trace in _traces(arguments, [0.1, 1.0]):
        outcomes = cohorts.compare(
            trace, arguments.speedup or [2.0, 3.0, 4.0, 5.0], wait, cost, slots, arguments.layers
        )
        title = f"{load}, {slots} at a time, {arguments.layers} layers, cohort_wait={wait}"
        tables.append(cohorts.table(outcomes, title))
        loads.append({"load": load, "outcomes": [outcome.as_dict() for outcome in outcomes]})
        say(f"{load}: done")
    return {"step_cost": asdict(cost), "loads": loads}, tables, True


def measure_arrivals(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table], bool]:
    """Requests that arrive over time, on real servers."""
    configurations = [plain()[0], *map(plugin, arguments.plugin)]
    servers = _servers(configurations, arguments, ARGUMENTS, say)
    loads, tables = [], []
    with running(servers):
        for load, trace in _traces(arguments, [1.0]):
            prompts = arrivals.cut_prompts(arguments.model, arguments.prompts_file, trace, arguments.seed)
            say(load)
            found = arrivals.measure(configurations, servers, trace, prompts, arguments.rounds, say)
            loads.append({"load": load, "rows": [row.as_dict() for row in found]})
            tables.append(arrivals.table(found, f"{arguments.model}, {load}, {arguments.rounds} rounds"))
    return {"loads": loads}, tables, True


def _traces(arguments: argparse.Namespace, rates: Sequence[float]) -> list[tuple[str, list[Arrival]]]:
    """What arrives, and what to call it: the recorded trace, or one for each rate."""
    if arguments.trace:
        trace = traces.read(arguments.trace)
        return [(f"{arguments.trace.name}: {len(trace)} requests", trace)]
    most = arguments.max_tokens
    least = most if arguments.min_tokens is None else arguments.min_tokens
    lengths = str(most) if least == most else f"{least} to {most}"
    bursts = f" in bursts of {arguments.burst}" if arguments.burst > 1 else ""
    found = []
    for rate in arguments.rate or rates:
        what = (arguments.prompts, rate, arguments.prompt_tokens, (least, most), arguments.seed, arguments.burst)
        load = f"{arguments.prompts} requests at {rate:g}/s{bursts}, answers of {lengths} tokens, seed {arguments.seed}"
        found.append((load, traces.poisson(*what)))
    return found


def check_cache(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Table], bool]:
    """Total cost of Zipf traffic behind an answer cache."""
    lines = caching.measure(arguments.seed, say=say)
    table = Table(
        title=f"cost of {caching.REQUESTS} requests for {caching.QUERIES} queries, of making every answer anew; mean of "
        f"{caching.TRAFFICS} traffics, seed {arguments.seed}",
        caption="optimum: the answers with the largest true frequency x cost, there from the start and kept",
    )
    for name in ("costs", "Zipf exponent", "room for", *caching.NAMES, "optimum"):
        table.add_column(name, justify="left" if name == "costs" else "right")
    for line in lines:
        shares = (f"{share:.3f}" for share in (*line.cost.values(), line.optimum))
        table.add_row(line.costs, f"{line.exponent:g}", str(line.entries), *shares)
    return {"lines": [line.as_dict() for line in lines]}, [table], True


def measure_kernels(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table], bool]:
    """The Triton kernels, on a GPU."""
    from vllm_spec_plugins.tools import kernels

    kernels.available()
    stopwatch = kernels.Stopwatch()
    machine = kernels.measure_machine(stopwatch)
    found = kernels.measure(arguments.kernel or list(kernels.CASES), stopwatch, "cuda", say)
    figures = {"gpu": asdict(machine), "figures": [figure.as_dict(machine) for figure in found]}
    return figures, kernels.tables(machine, found), not any(figure.wrong for figure in found)


def _servers(
    configurations: Sequence[Configuration],
    arguments: argparse.Namespace,
    own: Sequence[str],
    say: Callable[[str], None],
) -> list[Server]:
    names = [configuration.name for configuration in configurations]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} would be measured twice; give it once")
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="vllm-spec-bench-"))
    servers = serve(configurations, arguments.model, [*own, *arguments.serve], logs, arguments.threads)
    for server in servers:
        say(f"starting {' '.join(server.command)} (log: {server.log})")
    return servers


MEASUREMENTS: dict[str, Callable[..., tuple[dict[str, Any], list[Table], bool]]] = {
    "speed": speed,
    "identity": check_identity,
    "json": check_json,
    "distribution": check_distribution,
    "acceptance": check_acceptance,
    "cohorts": simulate_cohorts,
    "arrivals": measure_arrivals,
    "cache": check_cache,
    "kernels": measure_kernels,
}
# prompts, max_tokens
DEFAULTS = {
    "speed": (16, 128),
    "identity": (200, 128),
    "json": (200, 256),
    "distribution": (0, 0),
    "acceptance": (0, 0),
    "cohorts": (96, 256),
    "arrivals": (32, 128),
    "cache": (0, 0),
    "kernels": (0, 0),
}
