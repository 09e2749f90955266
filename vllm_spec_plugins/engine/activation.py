# SPDX-License-Identifier: Apache-2.0
"""Switching a plugin on, in this process and in those that it starts."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

from vllm_spec_plugins import CONFIG_KEY, compiled, registry
from vllm_spec_plugins.config import ENVIRONMENT, FLAG, Settings
from vllm_spec_plugins.engine import support
from vllm_spec_plugins.engine.settings import speculative_config
from vllm_spec_plugins.hook import apply, installed_vllm
from vllm_spec_plugins.proposers.base import Count
from vllm_spec_plugins.registry import method_of

# Tells the processes of an engine that a plugin is on before they have its configuration.
ACTIVE = "SPEC_PLUGINS_ACTIVE"


def prepare(engine_args: Any, settings: Settings) -> None:
    """Before the configuration is made: check the arguments, apply the hooks, ask for room for the drafts."""
    support.check_version(installed_vllm())
    support.check_scheduler(engine_args, settings)
    nodes, _ = method_of(settings).shape(settings)
    own = speculative_config(nodes) if nodes else None
    if engine_args.speculative_config != own:  # the arguments of a restarted engine carry it already
        support.check_arguments(engine_args, settings)
    support.choose_attention(engine_args, settings)
    engine_args.additional_config = {**(engine_args.additional_config or {}), CONFIG_KEY: settings.as_given()}
    engine_args.speculative_config = own
    os.environ[ACTIVE] = json.dumps(settings.as_given())
    install()


def check(config: Any, settings: Settings) -> None:
    """After the configuration is made: refuse what the plugin cannot serve, and say it when output is not exact."""
    from vllm.logger import init_logger

    from vllm_spec_plugins.engine import cohorts

    support.check_engine(config, settings)
    if method_of(settings).proposer is not None and config.device_config.device_type == "cuda":
        init_logger(f"vllm.{__name__}").info(
            "%s %s: tree attention on CUDA devices was tested under Triton's interpreter and compiled for compute capabilities "
            "8.0 and 9.0; it has not been measured on a GPU",
            FLAG,
            settings.title,
        )
    if (scheduler := cohorts.class_for(settings, config)) is not None:
        config.scheduler_config.scheduler_cls = scheduler
    method = method_of(settings)
    if method.schedule is not None:
        init_logger(f"vllm.{__name__}").warning(
            "%s %s is lossy: the later a token of an answer, the fewer layers it runs: %s",
            FLAG,
            settings.name,
            method.schedule(settings, config.model_config.get_total_num_hidden_layers()),
        )
    if not (rule := method.rule(settings)).lossless:
        init_logger(f"vllm.{__name__}").warning(
            "%s %s: %s",
            FLAG,
            settings.name,
            rule.caveat,
        )


def clear() -> None:
    """An engine without a plugin is being configured: its processes must not load one."""
    os.environ.pop(ACTIVE, None)


@lru_cache(maxsize=8)
def _depth_of(active: str) -> int | None:
    settings = registry.resolve(active)
    return method_of(settings).shape(settings)[1] or None


def max_depth() -> int | None:
    """Depth of the trees of the plugin that is on in this process; None: no plugin, or one without speculation."""
    active = os.environ.get(ACTIVE)
    return _depth_of(active) if active else None


@lru_cache(maxsize=8)
def _counts_of(active: str) -> tuple[Count, ...]:
    settings = registry.resolve(active)
    return method_of(settings).counts(settings)


def counts() -> tuple[Count, ...]:
    """What the plugin that is on in this process counts beside acceptance."""
    active = os.environ.get(ACTIVE)
    return _counts_of(active) if active else ()


def install() -> None:
    """Apply the engine's hooks in this process; on a CPU the CPU lane too. Idempotent."""
    from vllm import envs
    from vllm.platforms import current_platform

    from vllm_spec_plugins.engine.hooks import ENGINE_HOOKS

    if current_platform.is_cpu():
        from vllm_spec_plugins import cpu

        cpu.install(for_every_engine=False)
        _register_attention("CPU_ATTN")
    elif current_platform.is_cuda():
        _register_attention("TRITON_ATTN")
    apply(ENGINE_HOOKS)
    # vLLM warns of environment variables with its prefix that it does not know.
    envs.environment_variables.setdefault(ENVIRONMENT, lambda: os.environ.get(ENVIRONMENT))


def _register_attention(name: str) -> None:
    """Put tree attention in the place of vLLM's backend `name`. What it does for rows without a tree is that backend's, so an
    engine without a plugin gets what it would get.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    triton = name != "CPU_ATTN" or compiled.use_kernels
    own = "triton_attention.TritonTreeBackend" if triton else "attention.TreeAttentionBackend"
    register_backend(AttentionBackendEnum[name], f"vllm_spec_plugins.engine.{own}")
    # An engine built earlier in this process has left vLLM's own choice in the cache.
    selector._cached_get_attn_backend.cache_clear()
