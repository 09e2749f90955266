# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-spec`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_spec_plugins import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2: wrong usage, 130: interrupted)."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="vllm-spec", description="Tools around `vllm serve --plugin`.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="check this installation, say what to do where it does not fit")
    commands.add_parser("demo", help="plain vLLM and a plugin side by side, on real servers", add_help=False)
    commands.add_parser(
        "bench",
        help="measure speed, identity, JSON answers, distribution, acceptance, arrivals, kernels; simulate cohorts",
        add_help=False,
    )
    commands.add_parser(
        "train", help="train Medusa heads, a model for SkipDecode, or gates for early exits", add_help=False
    )
    commands.add_parser("router", help="one server over several vLLM servers, the cheapest first", add_help=False)
    commands.add_parser(
        "tune",
        help="find what a self-draft may skip, a cascade's rule, or a router's policy",
        add_help=False,
    )
    # The subcommands read what follows their name themselves, as `python -m` on their modules does.
    arguments = parser.parse_args(given[:1])

    try:
        if arguments.command == "doctor":
            commands.choices["doctor"].parse_args(given[1:])
            from vllm_spec_plugins.tools import doctor

            return doctor.run()
        if arguments.command == "demo":
            from vllm_spec_plugins.tools import demo

            return demo.main(given[1:], prog="vllm-spec demo")
        if arguments.command == "train":
            from vllm_spec_plugins.tools.train import cli

            return cli.main(given[1:], prog="vllm-spec train")
        if arguments.command == "router":
            from vllm_spec_plugins.tools.router import cli as router

            return router.main(given[1:], prog="vllm-spec router")
        if given[:2] == ["tune", "router"]:
            from vllm_spec_plugins.tools.router import tune as router_tune

            return router_tune.main(given[2:], prog="vllm-spec tune router")
        if arguments.command == "tune":
            from vllm_spec_plugins.tools import tune

            return tune.main(given[1:], prog="vllm-spec tune")
        from vllm_spec_plugins.tools import bench

        return bench.main(given[1:], prog="vllm-spec bench")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
