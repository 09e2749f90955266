# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM once per process."""
