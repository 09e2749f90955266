# SPDX-License-Identifier: Apache-2.0
"""The router inside one vLLM server, as an endpoint plugin: ``VLLM_PLUGINS=cascade_router SPEC_PLUGINS_CASCADE=FILE``."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from vllm_spec_plugins.cascade import config
from vllm_spec_plugins.tools.router.service import Service

ENVIRONMENT = "SPEC_PLUGINS_CASCADE"  # vLLM warns of VLLM_ variables that it does not know

# Beside the server's own routes: the server is itself an upstream, under them.
PREFIX = "/cascade"


class CascadeEndpoint:
    """What vLLM's group ``vllm.endpoint_plugins`` asks for (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "cascade_router"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; they open their connections and start their health checks when the server starts.

        Raises CascadeConfigError, which stops the start. (vLLM goes on without a plugin that fails when it is made.)
        """
        path = os.environ.get(ENVIRONMENT)
        if not path:
            raise config.CascadeConfigError(
                f"{ENVIRONMENT} is not set: VLLM_PLUGINS names {self.name}; set {ENVIRONMENT} to its YAML file, or leave it out"
            )
        app.include_router(Service(config.load(Path(path)), path).router(PREFIX))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing: the engine is reached as every upstream is, over HTTP."""
