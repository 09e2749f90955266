# SPDX-License-Identifier: Apache-2.0
"""``make demo``: plain vLLM and a plugin answer the same prompts, side by side.

    python -m vllm_spec_plugins.tools.demo [--plugin lookahead]

Starts three real servers on loopback (vLLM as it comes, ``--plugin none``, the plugin), sends the same held-out prompts
through the OpenAI client, greedy and sampled with seeds, prints a table and stops the servers. Exit status 1 when an
output differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.registry import resolve
from vllm_spec_plugins.tools.load import GREEDY, PROMPTS, SAMPLED, TARGET, load_prompts
from vllm_spec_plugins.tools.report import console, speed_table
from vllm_spec_plugins.tools.server import ServerError, running, stop_on_sigterm
from vllm_spec_plugins.tools.speed import measure, plain, plugin, serve

# fp32: in bf16 plain vLLM itself gives other tokens at another batch size. Eager: nothing to compile at first start.
ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 27))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugin", metavar="SPEC", default="lookahead", help="the plugin to show (%(default)s)")
    parser.add_argument("--model", type=Path, default=TARGET, help="checkpoint (the tiny one of the checkout)")
    parser.add_argument("--prompts-file", type=Path, default=PROMPTS, help='JSON lines with a "prompt" each')
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="how many of them (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="per prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements per line (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """The demonstration; returns the exit status."""
    out = console()
    try:
        resolve(arguments.plugin)
        prompts = load_prompts(arguments.prompts_file, arguments.prompts)
    except (SettingError, OSError, ValueError) as error:
        out.print(f"error: {error}", style="red", markup=False)
        return 2

    begin = time.monotonic()
    configurations = [*plain(), plugin(arguments.plugin)]
    with tempfile.TemporaryDirectory(prefix="vllm-spec-demo-") as logs:
        servers = serve(configurations, arguments.model, ARGUMENTS, Path(logs), threads=None)
        out.print("Starting three servers on loopback (about a minute):")
        for server in servers:
            out.print(f"  {' '.join(server.command)} --port {server.port}", highlight=False, soft_wrap=True)
        try:
            with running(servers):
                out.print(
                    f"All answer after {time.monotonic() - begin:.0f} s. {len(prompts)} prompts from held-out text:"
                )
                rows = measure(
                    configurations,
                    servers,
                    prompts,
                    samplings=(GREEDY, SAMPLED),
                    concurrencies=(1,),
                    max_tokens=arguments.max_tokens,
                    rounds=arguments.rounds,
                    say=lambda what: out.print(f"  {what}"),
                )
        except ServerError as error:
            out.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            return 1
    out.print(speed_table(rows, f"{arguments.model.name}, fp32, up to {arguments.max_tokens} tokens per prompt"))
    lossless = all(row.lossless for row in rows)
    out.print(
        f"Servers stopped after {time.monotonic() - begin:.0f} s. "
        + ("Every output is identical." if lossless else "Outputs DIFFER: please report this.")
    )
    return 0 if lossless else 1


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.demo") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    add_arguments(parser)
    stop_on_sigterm()
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
