# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point."""

from __future__ import annotations

import logging
import os
import sys

from vllm_spec_plugins.config import ENVIRONMENT, FLAG


def register() -> None:
    """Called by vLLM once per process: makes ``--plugin`` known; switches a plugin on where the parent process did.

    Raises HookMismatch when a plugin is asked for and the installed vLLM is not the one that the hooks fit. Without a
    plugin asked for, that is one log line and vLLM goes on as if this package were not installed.
    """
    from vllm_spec_plugins.engine import activation
    from vllm_spec_plugins.engine.hooks import FLAG_HOOKS
    from vllm_spec_plugins.hook import HookMismatch, apply

    try:
        apply(FLAG_HOOKS)
    except HookMismatch as mismatch:
        asked = (
            any(argument.startswith(FLAG) for argument in sys.argv)
            or {ENVIRONMENT, activation.ACTIVE} & os.environ.keys()
        )
        if asked:
            raise
        logging.getLogger(__name__).warning("vllm-spec-plugins stays idle: %s", mismatch)
        return
    if os.environ.get(activation.ACTIVE):
        activation.install()
