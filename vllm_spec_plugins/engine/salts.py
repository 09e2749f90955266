# SPDX-License-Identifier: Apache-2.0
"""Salts of the prefix cache where generated tokens run part of the layers.

K/V of the layers that a token skipped does not exist, and K/V of the others is not what all layers would have given. So a
block that ends behind the prompt is hashed with the schedule and the prompt's length, which together say the depth of each of
its tokens: only the request itself, computed again after preemption, or one with the same prompt that is, can find it. Blocks
within a prompt ran all layers and are everybody's.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from vllm_spec_plugins.config import FLAG
from vllm_spec_plugins.engine.settings import settings_of
from vllm_spec_plugins.registry import method_of


def admit(request: EngineCoreRequest, config: VllmConfig) -> None:
    """Raise VLLMValidationError (HTTP 400) for a request whose answer would become a part of its prompt."""
    settings = settings_of(config)
    if request.resumable and settings is not None and method_of(settings).schedule is not None:
        raise VLLMValidationError(
            f"{FLAG} {settings.name}: a prompt that comes in pieces cannot be served with part of the layers; send it whole"
        )


def mark(scheduler: Any, request: Request) -> None:
    """Give a new request its salt, a key as vLLM's own are: (kind, value). Its prompt is all that is hashed yet."""
    if not hasattr(scheduler, "_spec_schedule"):
        scheduler._spec_schedule = _schedule_key(scheduler.vllm_config)
    if scheduler._spec_schedule is not None:
        name, key = scheduler._spec_schedule
        request._spec_salt = (name, (*key, request.num_prompt_tokens))  # type: ignore[attr-defined]


def _schedule_key(config: VllmConfig) -> tuple[str, tuple[int, ...]] | None:
    settings = settings_of(config)
    make = None if settings is None else method_of(settings).schedule
    if settings is None or make is None:
        return None
    return settings.name, make(settings, config.model_config.get_total_num_hidden_layers()).key
