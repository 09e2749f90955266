# SPDX-License-Identifier: Apache-2.0
"""Measurements on real servers: speed beside plain vLLM, identity of the output, constrained answers, distribution of the
samples.

Three need no server. `acceptance`: how often the walk goes on, by how a node's children were chosen. `cohorts`: a simulation of
admission policies for SkipDecode. `cache`: what an answer cache saves, by what it evicts. `arrivals` sends requests that come
over time, not a number at a time.

    python -m vllm_spec_plugins.tools.bench [speed] --plugin lookahead --plugin lookahead:guesses=8 --json speed.json
    python -m vllm_spec_plugins.tools.bench identity --plugin lookahead
    python -m vllm_spec_plugins.tools.bench json --plugin lookahead:guesses=4
    python -m vllm_spec_plugins.tools.bench distribution --plugin lookahead
    python -m vllm_spec_plugins.tools.bench acceptance
    python -m vllm_spec_plugins.tools.bench cohorts --rate 0.1 --rate 1
    python -m vllm_spec_plugins.tools.bench arrivals --rate 2 --plugin skipdecode:speedup=2
    python -m vllm_spec_plugins.tools.bench cache

Further arguments for every server follow a ``--``: ``... bench --model M -- --max-model-len 2048``. Exit status 1 when an
output is not plain vLLM's, or not what its schema allows.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.registry import resolve
from vllm_spec_plugins.tools import acceptance, arrivals, caching, cohorts, identity, report, traces
from vllm_spec_plugins.tools.load import GREEDY, PROMPTS, SAMPLED, TARGET, load_prompts
from vllm_spec_plugins.tools.server import Server, ServerError, running, stop_on_sigterm
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
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=MEASUREMENTS, default="speed", help="what to measure (%(default)s)")
    parser.add_argument(
        "--plugin",
        metavar="SPEC",
        action="append",
        help='a plugin to measure; may be given several times (lookahead); "A & B": both on one server',
    )
    parser.add_argument("--model", type=Path, default=TARGET, help="checkpoint (the tiny one of the checkout)")
    parser.add_argument("--prompts-file", type=Path, default=PROMPTS, help='JSON lines with a "prompt" each')
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help="how many of them (speed: 16, identity and json: 200, cohorts: 96, arrivals: 32)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="per prompt (128; json, cohorts: 256)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="speed, arrivals: measurements per line (%(default)s)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        action="append",
        metavar="N",
        help="requests at a time; several times for speed (1, 8)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=4000,
        metavar="N",
        help="distribution: per prompt; acceptance: per pair (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=secrets.randbelow(2**31),
        metavar="N",
        help="distribution: the server's; acceptance: of the pairs and noise; cohorts, arrivals, cache: of the traffic (new)",
    )
    over_time = parser.add_argument_group("requests that arrive over time (cohorts, arrivals)")
    over_time.add_argument(
        "--rate", type=float, action="append", metavar="N", help="requests per second; may be repeated"
    )
    over_time.add_argument("--burst", type=int, default=1, metavar="N", help="so many come together (%(default)s)")
    over_time.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of every prompt (%(default)s)")
    over_time.add_argument("--min-tokens", type=int, metavar="N", help="of the shortest answer (--max-tokens)")
    over_time.add_argument(
        "--trace", type=Path, metavar="FILE", help='JSON lines {"seconds": 0, "prompt": 9, "output": 99}'
    )
    over_time.add_argument("--cohort-wait", type=int, default=64, metavar="N", help="cohorts: steps (%(default)s)")
    over_time.add_argument("--max-num-seqs", type=int, default=8, metavar="N", help="cohorts: at a time (%(default)s)")
    over_time.add_argument(
        "--speedup", type=float, action="append", metavar="N", help="cohorts: schedules (2, 3, 4, 5)"
    )
    over_time.add_argument("--layers", type=int, default=cohorts.LAYERS, metavar="N", help="cohorts (%(default)s)")
    over_time.add_argument(
        "--step-times",
        type=Path,
        metavar="FILE",
        help='cohorts: JSON lines {"deepest": 24, "layers": 192, "milliseconds": 206}',
    )
    parser.add_argument("--no-ngram", action="store_true", help="speed: leave out vLLM's own ngram method")
    parser.add_argument("--ngram-drafts", type=int, default=4, metavar="N", help="its drafts per step (%(default)s)")
    parser.add_argument("--ngram-longest", type=int, default=4, metavar="N", help="its longest match (%(default)s)")
    parser.add_argument("--vllm-medusa", metavar="HEADS", help="speed: measure vLLM's own chain of these Medusa heads")
    parser.add_argument("--vllm-draft", metavar="MODEL", help="speed: measure vLLM's own chain of this draft model")
    parser.add_argument("--vllm-drafts", type=int, default=4, metavar="N", help="their drafts per step (%(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="OpenMP threads per server, sleeping when they wait; 1 where anything else runs (as the environment says)",
    )
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="where the servers' logs go (a new temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, machine and versions there")


def run(arguments: argparse.Namespace) -> int:
    """One measurement; returns the exit status."""
    out = report.console()
    arguments.plugin = arguments.plugin or ["lookahead"]
    prompts, max_tokens = DEFAULTS[arguments.what]
    arguments.prompts = prompts if arguments.prompts is None else arguments.prompts
    arguments.max_tokens = max_tokens if arguments.max_tokens is None else arguments.max_tokens
    begin = time.monotonic()

    def say(what: str) -> None:
        out.print(f"[{time.monotonic() - begin:5.0f} s] {what}", markup=False, highlight=False, soft_wrap=True)

    try:
        for spec in arguments.plugin:
            resolve(spec)
        figures, tables, right = MEASUREMENTS[arguments.what](arguments, say)
    except (SettingError, ServerError, OSError, ValueError) as error:
        out.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    for table in tables:
        out.print(table)
    if arguments.json:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        report.write_json(arguments.json, {"measurement": arguments.what, "arguments": given, **figures})
    if not right:
        out.print("NOT plain vLLM's output, or not valid: see above", style="red")
    return 0 if right else 1


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first ``--``."""
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.bench") -> int:
    own, serve_arguments = split(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    stop_on_sigterm()
    return run(parser.parse_args(own, argparse.Namespace(serve=serve_arguments)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
