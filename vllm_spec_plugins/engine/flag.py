# SPDX-License-Identifier: Apache-2.0
"""``--plugin``: from the command line, a YAML config file, the environment or Python into the engine's configuration."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from vllm_spec_plugins import CONFIG_KEY, registry
from vllm_spec_plugins.config import ENVIRONMENT, FLAG, SettingError, Settings
from vllm_spec_plugins.engine import activation

# Set on engine arguments that came from a command line: its user wants a sentence, not a traceback.
_FROM_COMMAND_LINE = "_spec_plugins_from_command_line"


def add_to(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flag to vLLM's parser."""
    group = parser.add_argument_group(title="Speculation plugins", description="Fewer target-model passes per token.")
    group.add_argument(
        FLAG,
        action="append",
        type=_valid,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"Speculate with a plugin: {', '.join(registry.METHODS)}. Settings follow the name "
        f'("lookahead:guesses=4,ngram=5") or come as JSON (\'{{"name": "lookahead", "guesses": 4}}\'). '
        f"Given several times, the plugins propose one tree together; {FLAG} mix:nodes=N sets its size. "
        f'"none" serves on the same runner without speculation. Also from the environment variable {ENVIRONMENT}.',
    )
    return parser


def _valid(value: str) -> list[dict[str, Any]]:
    try:
        return [settings.as_dict() for settings in registry.plugins(value)]
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(FLAG).lstrip()) from error


def read(engine_args: Any, args: argparse.Namespace) -> Any:
    """Take the parsed flag over into engine arguments."""
    setattr(engine_args, _FROM_COMMAND_LINE, True)
    given = [plugin for plugins in getattr(args, "plugin", None) or [] for plugin in plugins]
    if given:
        engine_args.additional_config = {**(engine_args.additional_config or {}), CONFIG_KEY: given}
    return engine_args


def create_config(engine_args: Any, create: Callable[[], Any]) -> Any:
    """Make the VllmConfig with the plugin that is asked for, or exactly vLLM's own.

    Raises SettingError for settings that cannot work; for a command line, exits with its sentence.
    """
    try:
        settings = _asked_for(engine_args)
        if settings is None:
            activation.clear()
            return create()
        activation.prepare(engine_args, settings)
        config = create()
        activation.check(config, settings)
    except SettingError as error:
        if getattr(engine_args, _FROM_COMMAND_LINE, False):
            raise SystemExit(f"vllm serve: error: {error}") from error
        raise
    return config


def _asked_for(engine_args: Any) -> Settings | None:
    """Flag or Python first; the environment when neither is given."""
    given: Any = (engine_args.additional_config or {}).get(CONFIG_KEY)
    if given is None:
        given = os.environ.get(ENVIRONMENT, "").strip() or None
    return None if given is None else registry.resolve(given)


def to_environment(settings: Settings) -> str:
    """Settings as text for processes that this one starts."""
    return json.dumps(settings.as_given())
