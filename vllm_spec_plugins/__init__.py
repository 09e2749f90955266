# SPDX-License-Identifier: Apache-2.0
"""Token trees, self-speculation and layer plans for the vLLM serving engine.

``vllm serve MODEL --plugin lookahead`` on the command line, or in Python::

    LLM(MODEL, **vllm_spec_plugins.engine_args("lookahead", guesses=4))
    LLM(MODEL, **vllm_spec_plugins.engine_args("lookahead", "medusa:model=HEADS"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__version__ = "0.1.0"

# Key of VllmConfig.additional_config under which the settings reach every process.
CONFIG_KEY = "spec_plugins"


def engine_args(
    *plugins: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``LLM`` or ``EngineArgs`` that switch a plugin on, or several together.

    Args:
        plugins: each as after ``--plugin``, or as a mapping with a "name".
        additional_config: what else ``additional_config`` is to hold.
        settings: the plugin's settings, where there is one and it is given by its name alone.

    Raises config.SettingError on a wrong name, key, type or value, and on plugins that do not go together.
    """
    from vllm_spec_plugins import registry
    from vllm_spec_plugins.config import SettingError

    if settings and not (len(plugins) == 1 and isinstance(plugins[0], str)):
        raise SettingError(
            f"engine_args: {', '.join(settings)} could belong to any of {len(plugins)} plugins; "
            f'write them with their plugin, as in engine_args("lookahead:nodes=8", "medusa:model=HEADS")'
        )
    parsed = registry.resolve({"name": plugins[0], **settings} if settings else plugins)
    return {"additional_config": {**(additional_config or {}), CONFIG_KEY: parsed.as_given()}}
