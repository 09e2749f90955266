# SPDX-License-Identifier: Apache-2.0
"""Measurements on real servers: speed beside plain vLLM, identity of the output, constrained answers, distribution of the
samples.

Some need no server. `acceptance`: how often the walk goes on, by how a node's children were chosen. `cohorts`: a simulation of
admission policies for SkipDecode. `cache`: what an answer cache saves, by what it evicts. `arrivals` sends requests that come
over time, not a number at a time. `kernels`: the Triton kernels, on a GPU.

    python -m vllm_spec_plugins.tools.bench [speed] --plugin lookahead --plugin lookahead:guesses=8 --json speed.json
    python -m vllm_spec_plugins.tools.bench identity --plugin lookahead
    python -m vllm_spec_plugins.tools.bench json --plugin lookahead:guesses=4
    python -m vllm_spec_plugins.tools.bench distribution --plugin lookahead
    python -m vllm_spec_plugins.tools.bench acceptance
    python -m vllm_spec_plugins.tools.bench cohorts --rate 0.1 --rate 1
    python -m vllm_spec_plugins.tools.bench arrivals --rate 2 --plugin skipdecode:speedup=2
    python -m vllm_spec_plugins.tools.bench cache
    python -m vllm_spec_plugins.tools.bench kernels --json kernels.json

Further arguments for every server follow a ``--``: ``... bench --model M -- --max-model-len 2048``. Exit status 1 when an
output is not plain vLLM's, not what its schema allows, or not what a kernel's reference computes.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.registry import resolve
from vllm_spec_plugins.tools import cohorts, report
from vllm_spec_plugins.tools.kernel_cases import CASES
from vllm_spec_plugins.tools.load import PROMPTS, TARGET
from vllm_spec_plugins.tools.measurements import DEFAULTS, MEASUREMENTS
from vllm_spec_plugins.tools.server import ServerError, stop_on_sigterm


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
    parser.add_argument(
        "--kernel", action="append", choices=CASES, metavar="NAME", help=f"kernels: one of {', '.join(CASES)} (all)"
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
        out.print("NOT plain vLLM's output, not valid, or not the reference's: see above", style="red")
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
