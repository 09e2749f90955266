# SPDX-License-Identifier: Apache-2.0
"""What an engine must not be for trees, or schedules of layers, to be right in it; each refusal is one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.platforms import current_platform
from vllm.tokenizers import get_tokenizer
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spec_plugins.config import FLAG, SettingError, Settings
from vllm_spec_plugins.depth_settings import SkipDecodeSettings
from vllm_spec_plugins.engine import weights
from vllm_spec_plugins.engine.backend import on_triton
from vllm_spec_plugins.method import Draft, Target
from vllm_spec_plugins.registry import method_of

# Of vLLM's attention backends on CUDA devices, the one that this package extends.
TREE_BACKEND = "TRITON_ATTN"
LEAST_CAPABILITY, LARGEST_HEAD, MOST_ROWS = (8, 0), 256, 256
# 8-bit K/V caches, with a scale per layer. vLLM's Triton kernels would take fp8_e5m2 for e4m3 as well.
EIGHT_BITS = ("fp8", "fp8_e4m3")

# Releases whose seams the hooks were written against and tested with.
TESTED_RELEASES = ("0.32",)


def check_version(found: str) -> None:
    """Raise SettingError unless the installed vLLM is a tested release."""
    if ".".join(found.split("+")[0].split(".")[:2]) not in TESTED_RELEASES:
        raise SettingError(
            f"{FLAG}: this release works with vLLM {', '.join(f'{r}.*' for r in TESTED_RELEASES)}, "
            f"but vLLM {found} is installed; install one of those, or start without {FLAG}"
        )


def check_arguments(engine_args: Any, settings: Settings) -> None:
    """Raise SettingError when other flags, or the environment, contradict the plugin."""
    # Not vllm.envs: it keeps what it read when an engine was first built in this process.
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "").strip().lower() in ("0", "false"):
        raise SettingError(f"{FLAG} {settings.title}: VLLM_USE_V2_MODEL_RUNNER=0 asks for another runner; unset it")
    if engine_args.speculative_config:
        raise SettingError(
            f"{FLAG} {settings.title}: conflicts with --speculative-config {engine_args.speculative_config}; give only one"
        )


def check_scheduler(engine_args: Any, settings: Settings) -> None:
    """Raise SettingError when the user's scheduler stands where the plugin's own has to."""
    if isinstance(settings, SkipDecodeSettings) and settings.cohort_wait and engine_args.scheduler_cls is not None:
        cls = engine_args.scheduler_cls
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        raise SettingError(
            f"{FLAG} {settings.name}: cohort_wait={settings.cohort_wait} brings a scheduler of its own and conflicts with "
            f"--scheduler-cls {name}; give only one, or use cohort_wait=0"
        )


def choose_attention(engine_args: Any, settings: Settings) -> None:
    """On CUDA devices: have the backend chosen that verifies trees. Raises SettingError when another one was asked for."""
    if method_of(settings).proposer is None or not current_platform.is_cuda():
        return
    config = engine_args.attention_config
    asked = {
        "--attention-backend": engine_args.attention_backend,
        "--attention-config.backend": config.backend,
        **{f"--attention-config.backend_per_kind.{kind}": name for kind, name in config.backend_per_kind.items()},
    }
    for flag, backend in asked.items():
        name = getattr(backend, "name", backend)
        if name is not None and str(name).upper() not in (TREE_BACKEND, "AUTO"):
            raise SettingError(
                f"{FLAG} {settings.title}: {flag} {name} does not verify trees; use {TREE_BACKEND}, or leave it out"
            )
    if config.backend is None:
        engine_args.attention_backend = AttentionBackendEnum[TREE_BACKEND]


def check_engine(config: VllmConfig, settings: Settings) -> None:
    """Raise SettingError when the model or the deployment is of a kind that is not supported."""
    method = method_of(settings)
    if method.proposer is None and method.schedule is None:
        return
    own = _unsupported_by_trees(config, settings) if method.schedule is None else _unsupported_by_schedules(config)
    for what, instead in (*_unsupported(config), *own):
        raise SettingError(f"{FLAG} {settings.title}: {what} is not supported; {instead}")
    if method.schedule is not None:
        method.schedule(settings, config.model_config.get_total_num_hidden_layers())
    if method.check is not None:
        model = config.model_config
        target = Target(
            hidden_size=model.get_hidden_size(),
            vocab_size=model.get_vocab_size(),
            max_model_len=model.max_model_len,
            num_layers=model.get_total_num_hidden_layers(),
            lora=config.lora_config is not None,
            shapes=partial(weights.shapes, load=config.load_config),
            draft=partial(_draft, model),
        )
        method.check(settings, target)


def _draft(target: ModelConfig, model: str) -> Draft:
    """What draft model `model` is. Raises ValueError with what is wrong with it."""
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ValueError(f"{model} is neither a folder nor a hub id")
    from vllm_spec_plugins.engine.drafter import model_config

    try:
        config = model_config(target, model)
        own, theirs = (get_tokenizer(each).get_vocab() for each in (model, target.tokenizer))
    except (OSError, ValueError) as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    if config.is_hybrid or config.is_attention_free or config.use_mla or config.get_sliding_window() is not None:
        raise ValueError("it has layers without full attention")
    if config.runner_type != "draft" or config.is_encoder_decoder or config.uses_mrope:
        raise ValueError("it is not a decoder-only model of text")
    return Draft(config.get_vocab_size(), _longest(config), own == theirs)


def _longest(config: ModelConfig) -> int:
    """Positions that the model itself allows; what the target is asked to serve does not count."""
    return int(getattr(config.hf_text_config, "max_position_embeddings", config.max_model_len))


def _unsupported(config: VllmConfig) -> Iterator[tuple[str, str]]:
    """(what is not supported, what would be valid), for everything that does not hold; for trees and schedules alike."""
    model, parallel = config.model_config, config.parallel_config
    name = model.model
    without = _without()
    if model.runner_type != "generate":
        yield f"a {model.runner_type} model ({name})", "use a model that generates text"
    if model.is_encoder_decoder:
        yield f"an encoder-decoder model ({name})", without
    if model.is_hybrid or model.is_attention_free:
        yield f"a hybrid or Mamba model ({name})", without
    if model.use_mla:
        yield f"a model with multi-head latent attention ({name})", without
    if any("chunked" in str(kind) for kind in _layer_types(model)):
        yield f"a model with chunked attention ({name})", without
    if model.uses_mrope:
        yield f"a model with multi-dimensional rotary positions ({name})", without
    if model.is_multimodal_model:
        yield f"a multimodal model ({name})", without
    if model.is_diffusion:
        yield f"a diffusion model ({name})", without
    if _uses_alibi(model.hf_text_config):
        yield f"a model with ALiBi positions ({name})", without
    if parallel.pipeline_parallel_size > 1:
        yield f"--pipeline-parallel-size {parallel.pipeline_parallel_size}", "use --tensor-parallel-size"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism", "use --tensor-parallel-size"
    if parallel.use_ubatching:
        yield "micro-batching (--enable-dbo)", "start without it"
    if config.kv_transfer_config is not None:
        yield "a K/V connector (--kv-transfer-config)", "start without it"


def _unsupported_by_trees(config: VllmConfig, settings: Settings) -> Iterator[tuple[str, str]]:
    model = config.model_config
    if (window := _window(model)) is not None:
        method = method_of(settings)
        if method.slots(settings):
            yield (
                f"a draft for a model with sliding-window attention ({model.model})",
                "use lookahead, jacobi or medusa",
            )
        if window <= (least := max(MOST_ROWS, 1 + method.shape(settings)[0])):  # the kernels take a tree to be inside
            yield f"a sliding window of {window} tokens ({model.model})", f"trees need more than {least}: {_without()}"
    if model.return_sampling_mask:
        yield "--return-sampling-mask", "start without it"
    if model.enable_trace_replay:
        yield "--enable-trace-replay", "start without it"
    if config.structured_outputs_config.backend == "lm-format-enforcer":
        yield "the structured outputs backend lm-format-enforcer", "use xgrammar, guidance, outlines or auto"
    if config.watermark_config is not None:
        yield "watermarking", "start without it"
    device = config.device_config.device_type
    if device == "cuda" and current_platform.is_cuda():
        yield from _unsupported_on_cuda(config, settings)
    elif device != "cpu":
        what = "ROCm" if device == "cuda" else device
        yield (
            f"tree attention on {what} devices",
            f"this release verifies trees on the CPU and on CUDA devices: use {FLAG} none there",
        )
    yield from _unsupported_caches(config, EIGHT_BITS if on_triton(torch.device(device)) else ())


def _unsupported_caches(config: VllmConfig, eight_bits: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """A K/V cache holds the model's own type, or one of `eight_bits`. A checkpoint may say so in the place of the flag."""
    asked, own = config.cache_config.cache_dtype, str(config.model_config.dtype).removeprefix("torch.")
    valid = ("auto", *((own,) if own != "float32" else ()), *eight_bits)  # vLLM has no name for caches of float32
    if asked not in valid:
        yield f"--kv-cache-dtype {asked}", f"use --kv-cache-dtype {' or '.join(valid)}"


def _unsupported_on_cuda(config: VllmConfig, settings: Settings) -> Iterator[tuple[str, str]]:
    model, none = config.model_config, f"use {FLAG} none there"
    for part in getattr(settings, "sources", None) or (settings,):
        if "cuda" not in method_of(part).devices:
            yield f"{part.name} on CUDA devices", f"this release runs it on the CPU only: {none}"
    capability = current_platform.get_device_capability()
    if capability is None or capability < LEAST_CAPABILITY:
        found = "unknown" if capability is None else capability.as_version_str()
        yield f"tree attention on a device of compute capability {found}", f"it needs 8.0 or more: {none}"
    if model.get_head_size() > LARGEST_HEAD:
        yield f"tree attention with heads of {model.get_head_size()}", f"it goes up to {LARGEST_HEAD} there: {none}"
    if (rows := 1 + method_of(settings).shape(settings)[0]) > MOST_ROWS:
        yield f"a tree of {rows} rows on CUDA devices", f"use settings with {MOST_ROWS - 1} nodes or fewer"


def _unsupported_by_schedules(config: VllmConfig) -> Iterator[tuple[str, str]]:
    if _window(config.model_config) is not None:
        yield f"a model with sliding-window attention ({config.model_config.model})", _without()
    if config.lora_config is not None:
        yield "--enable-lora, which names an adapter per row of the whole batch,", "start without it"
    if config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe:
        yield "data parallelism of experts, which all ranks run in step,", "use --tensor-parallel-size"
    if config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        yield "compilation mode STOCK_TORCH_COMPILE, which compiles all layers into one,", "use vLLM's own modes"
    if config.device_config.device_type != "cpu":
        yield (
            f"a schedule of layers on {config.device_config.device_type} devices",
            f"this release runs them on the CPU only: use {FLAG} none there",
        )
    yield from _unsupported_caches(config, ())


def _without() -> str:
    return f"serve it without {FLAG}, or with {FLAG} none"


def _layer_types(model: ModelConfig) -> list[Any]:
    return getattr(model.hf_text_config, "layer_types", None) or []


def _window(model: ModelConfig) -> int | None:
    """Tokens that a row sees in layers that do not see all; None: there are none."""
    window = model.get_sliding_window()
    kinds = _layer_types(model)
    return None if kinds and not any("sliding" in str(kind) for kind in kinds) else window


def _uses_alibi(text_config: Any) -> bool:
    return bool(getattr(text_config, "alibi", False)) or text_config.model_type in ("bloom", "mpt", "baichuan")
