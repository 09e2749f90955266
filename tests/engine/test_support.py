# SPDX-License-Identifier: Apache-2.0
"""What is not supported is refused at the start, in one sentence that says what would be valid."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spec_plugins import registry
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.engine import activation


def config(**changes: Any) -> Any:
    """A VllmConfig of a dense decoder on a CPU, as far as the checks look, with some attributes changed."""
    from vllm.config.compilation import CompilationMode

    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "model": "some/model",
            "runner_type": "generate",
            "is_encoder_decoder": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "use_mla": False,
            "uses_mrope": False,
            "is_multimodal_model": False,
            "is_diffusion": False,
            "is_moe": False,
            "get_total_num_hidden_layers": lambda: 8,
            "return_sampling_mask": False,
            "enable_trace_replay": False,
            "get_sliding_window": lambda: None,
            "hf_text_config": SimpleNamespace(model_type="llama"),
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "data_parallel_size": 1,
            "use_ubatching": False,
        },
        "cache_config": {"cache_dtype": "auto"},
        "structured_outputs_config": {"backend": "auto"},
        "device_config": {"device_type": "cpu"},
        "compilation_config": {"mode": CompilationMode.VLLM_COMPILE},
    }
    whole: dict[str, Any] = {"kv_transfer_config": None, "watermark_config": None, "lora_config": None}
    for key, value in changes.items():
        owner = next((part for part in parts.values() if key in part), whole)
        assert key in owner, key
        owner[key] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole)


KINDS: list[tuple[dict[str, Any], str]] = [
    ({"runner_type": "pooling"}, "a pooling model (some/model) is not supported; use a model that generates text"),
    (
        {"is_encoder_decoder": True},
        "an encoder-decoder model (some/model) is not supported; serve it without --plugin",
    ),
    ({"is_hybrid": True}, "a hybrid or Mamba model"),
    ({"is_attention_free": True}, "a hybrid or Mamba model"),
    ({"use_mla": True}, "multi-head latent attention"),
    ({"get_sliding_window": lambda: 4096}, "sliding-window attention"),
    (
        {"hf_text_config": SimpleNamespace(model_type="gemma3", layer_types=["sliding_attention", "full_attention"])},
        "sliding-window attention",
    ),
    ({"hf_text_config": SimpleNamespace(model_type="bloom")}, "ALiBi"),
    ({"uses_mrope": True}, "multi-dimensional rotary positions"),
    ({"is_multimodal_model": True}, "a multimodal model"),
    ({"is_diffusion": True}, "a diffusion model"),
    ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2 is not supported; use --tensor-parallel-size"),
    ({"decode_context_parallel_size": 2}, "context parallelism"),
    ({"use_ubatching": True}, "micro-batching (--enable-dbo)"),
    ({"kv_transfer_config": object()}, "a K/V connector (--kv-transfer-config)"),
    ({"cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2 is not supported; use --kv-cache-dtype auto"),
]
OF_TREES: list[tuple[dict[str, Any], str]] = [
    (
        {"backend": "lm-format-enforcer"},
        "the structured outputs backend lm-format-enforcer is not supported; use xgrammar",
    ),
    ({"watermark_config": object()}, "watermarking"),
    (
        {"device_type": "cuda"},
        "tree attention on cuda devices is not supported; this release verifies trees on the CPU",
    ),
]
OF_SCHEDULES: list[tuple[dict[str, Any], str]] = [
    ({"lora_config": object()}, "--enable-lora, which names an adapter per row"),
    ({"data_parallel_size": 2, "is_moe": True}, "data parallelism of experts"),
    ({"mode": 1}, "compilation mode STOCK_TORCH_COMPILE"),
    (
        {"device_type": "cuda"},
        "a schedule of layers on cuda devices is not supported; this release runs them on the CPU",
    ),
    (
        {"get_total_num_hidden_layers": lambda: 2},
        "warmup=3 is more than the 2 layers of the model; use warmup=2 or less",
    ),
]
SCHEDULE = "skipdecode:speedup=1.5,warmup=3"


@pytest.mark.parametrize(
    ("plugin", "change", "what"),
    [
        *(("lookahead", *case) for case in (*KINDS, *OF_TREES)),
        *((SCHEDULE, *case) for case in (*KINDS, *OF_SCHEDULES)),
    ],
)
def test_each_unsupported_kind_is_named(plugin: str, change: dict[str, Any], what: str) -> None:
    from vllm_spec_plugins.engine.support import check_engine

    settings = registry.resolve(plugin)
    check_engine(config(), settings)
    with pytest.raises(SettingError) as refusal:
        check_engine(config(**change), settings)
    message = str(refusal.value)
    assert message.startswith(f"--plugin {settings.name}: ")
    assert what in message
    assert "\n" not in message
    check_engine(config(**change), registry.resolve("none"))  # plain decoding runs wherever the runner does


def test_other_flags_and_the_environment_may_not_contradict_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine.support import check_arguments

    settings = registry.resolve("lookahead")
    check_arguments(SimpleNamespace(speculative_config=None), settings)
    with pytest.raises(SettingError, match=r"conflicts with --speculative-config \{'method': 'ngram'\}; give only one"):
        check_arguments(SimpleNamespace(speculative_config={"method": "ngram"}), settings)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(SettingError, match="VLLM_USE_V2_MODEL_RUNNER=0 asks for another runner; unset it"):
        check_arguments(SimpleNamespace(speculative_config=None), settings)


def test_a_process_without_a_plugin_loads_neither_numba_nor_the_engines_parts() -> None:
    """vLLM's `register_kernels` dies in a process that has numba; and what is not asked for costs no time."""
    script = """
import sys
from vllm_spec_plugins.plugin import register
register()
from vllm.engine.arg_utils import EngineArgs
parts = ("speculator", "drafter", "sampler")
print("numba" in sys.modules, [part for part in parts if f"vllm_spec_plugins.engine.{part}" in sys.modules])
"""
    environment = {key: value for key, value in os.environ.items() if key != activation.ACTIVE}  # of engines made here
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.splitlines()[-1] == "False []"
