# SPDX-License-Identifier: Apache-2.0
"""``vllm-spec router --config cascade.yaml``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from vllm_spec_plugins.cascade import config
from vllm_spec_plugins.tools.router.service import Service

GRACE = 30  # seconds that running answers have when the router is told to stop
# Seconds that an idle connection of a client is kept. Longer than clients keep theirs (httpx, and with it OpenAI's: 5, which is
# uvicorn's default too): who closes first must not be the one who is about to be asked.
IDLE = 30


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(prog=prog, description="An OpenAI-compatible server over several vLLM servers.")
    found.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML: stages, policy, budgets")
    found.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    found.add_argument("--port", type=int, default=8080, help="port to listen at (%(default)s)")
    found.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return found


def main(argv: Sequence[str] | None = None, prog: str = "python -m vllm_spec_plugins.tools.router.cli") -> int:
    """Serve until told to stop; 2 when the configuration cannot be used."""
    known = parser(prog)
    arguments = known.parse_args(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    # A line per call of an upstream is for debugging.
    logging.getLogger("httpx").setLevel("INFO" if arguments.log_level == "debug" else "WARNING")
    try:
        service = Service(config.load(arguments.config), str(arguments.config))
    except config.CascadeConfigError as error:
        known.error(str(error))
    if service.settings.client_keys_env is None:
        logging.getLogger(__name__).warning("no client_keys_env: whoever reaches this port is served, as one tenant")
    uvicorn.run(
        service.app(),
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.log_level,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=IDLE,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
