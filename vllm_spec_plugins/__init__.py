# SPDX-License-Identifier: Apache-2.0
"""Token trees, self-speculation and layer plans for the vLLM serving engine.

``vllm serve MODEL --plugin lookahead`` on the command line, or in Python::

    LLM(MODEL, **vllm_spec_plugins.engine_args("lookahead", guesses=4))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__version__ = "0.1.0"

# Key of VllmConfig.additional_config under which the settings reach every process.
CONFIG_KEY = "spec_plugins"


def engine_args(name: str, /, additional_config: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``LLM`` or ``EngineArgs`` that switch a plugin on.

    Args:
        name: a plugin, as after ``--plugin``.
        additional_config: what else ``additional_config`` is to hold.
        settings: the plugin's settings.

    Raises config.SettingError on a wrong name, key, type or value.
    """
    from vllm_spec_plugins import registry

    parsed = registry.resolve({"name": name, **settings})
    return {"additional_config": {**(additional_config or {}), CONFIG_KEY: parsed.as_dict()}}
