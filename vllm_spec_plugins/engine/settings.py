# SPDX-License-Identifier: Apache-2.0
"""Where the settings of a running engine stand."""

from __future__ import annotations

from typing import Any

from vllm_spec_plugins import CONFIG_KEY, registry
from vllm_spec_plugins.config import Settings

# What a plugin's speculative config carries as its model: how code that sees only that config knows it.
TREE_MODEL = "vllm-spec-plugins"


def settings_of(vllm_config: Any) -> Settings | None:
    """The settings that this engine was started with; None: it was started without ``--plugin``."""
    additional = vllm_config.additional_config
    given = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    return None if given is None else registry.resolve(given)


def is_tree_method(speculative_config: Any) -> bool:
    """Whether a SpeculativeConfig belongs to a plugin."""
    return speculative_config is not None and speculative_config.model == TREE_MODEL


def speculative_config(num_nodes: int) -> dict[str, Any]:
    """The SpeculativeConfig that makes room for `num_nodes` drafts per request.

    "ngram_gpu" is the method without weights that passes vLLM's gate for asynchronous scheduling and keeps the token
    ids on the device; its own speculator is never built.
    """
    return {"method": "ngram_gpu", "model": TREE_MODEL, "num_speculative_tokens": num_nodes}
