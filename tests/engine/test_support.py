# SPDX-License-Identifier: Apache-2.0
"""What is not supported is refused at the start, in one sentence that says what would be valid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spec_plugins import registry
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.engine import activation


def config(**changes: Any) -> Any:
    """A VllmConfig of a dense decoder on a CPU, as far as the checks look, with some attributes changed."""
    from vllm.config.compilation import CompilationMode

    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "model": "some/model",
            "dtype": torch.bfloat16,
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
            "get_head_size": lambda: 128,
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


SCHEDULE = "skipdecode:speedup=1.5,warmup=3"
KINDS: list[tuple[dict[str, Any], str]] = [
    ({"runner_type": "pooling"}, "a pooling model (some/model) is not supported; use a model that generates text"),
    (
        {"is_encoder_decoder": True},
        "an encoder-decoder model (some/model) is not supported; serve it without --plugin",
    ),
    ({"is_hybrid": True}, "a hybrid or Mamba model"),
    ({"is_attention_free": True}, "a hybrid or Mamba model"),
    ({"use_mla": True}, "multi-head latent attention"),
    ({"hf_text_config": SimpleNamespace(model_type="llama4", layer_types=["chunked_attention"])}, "chunked attention"),
    ({"hf_text_config": SimpleNamespace(model_type="bloom")}, "ALiBi"),
    ({"uses_mrope": True}, "multi-dimensional rotary positions"),
    ({"is_multimodal_model": True}, "a multimodal model"),
    ({"is_diffusion": True}, "a diffusion model"),
    ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2 is not supported; use --tensor-parallel-size"),
    ({"decode_context_parallel_size": 2}, "context parallelism"),
    ({"use_ubatching": True}, "micro-batching (--enable-dbo)"),
    ({"kv_transfer_config": object()}, "a K/V connector (--kv-transfer-config)"),
    ({"cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2 is not supported; use --kv-cache-dtype auto or bfloat16"),
    ({"cache_dtype": "float16"}, "--kv-cache-dtype float16 is not supported; use --kv-cache-dtype auto or bfloat16"),
    (
        {"cache_dtype": "bfloat16", "dtype": torch.float32},
        "--kv-cache-dtype bfloat16 is not supported; use --kv-cache-dtype auto",
    ),
]
OF_TREES: list[tuple[dict[str, Any], str]] = [
    (
        {"backend": "lm-format-enforcer"},
        "the structured outputs backend lm-format-enforcer is not supported; use xgrammar",
    ),
    ({"watermark_config": object()}, "watermarking"),
    (
        {"device_type": "xpu"},
        "tree attention on xpu devices is not supported; this release verifies trees on the CPU and on CUDA devices",
    ),
]
# On a CUDA device: plugin, what is changed in the model's configuration, compute capability, and the sentence.
OF_CUDA: list[tuple[str, dict[str, Any], tuple[int, int] | None, str]] = [
    ("lookahead", {}, (7, 5), "a device of compute capability 7.5 is not supported; it needs 8.0 or more"),
    ("lookahead", {}, None, "a device of compute capability unknown is not supported"),
    ("lookahead", {"get_head_size": lambda: 288}, (9, 0), "heads of 288 is not supported; it goes up to 256 there"),
    (
        "lookahead",
        {"cache_dtype": "int8_per_token_head"},
        (9, 0),
        "--kv-cache-dtype int8_per_token_head is not supported; "
        "use --kv-cache-dtype auto or bfloat16 or fp8 or fp8_e4m3",
    ),
    (
        "lookahead",
        {"cache_dtype": "fp8_per_token_head"},
        (9, 0),
        "--kv-cache-dtype fp8_per_token_head is not supported",
    ),
    (
        "lookahead",
        {"cache_dtype": "fp8_e5m2", "dtype": torch.float32},
        (9, 0),
        "--kv-cache-dtype fp8_e5m2 is not supported; use --kv-cache-dtype auto or fp8 or fp8_e4m3",
    ),
    (
        "self-draft:skip=1+2",
        {},
        (9, 0),
        "self-draft on CUDA devices is not supported; this release runs it on the CPU only",
    ),
    (
        "lookahead:window=0 & self-draft:skip=1+2",
        {},
        (9, 0),
        "self-draft on CUDA devices is not supported",
    ),
    ("cascade:rule=difference:0.1 & self-draft:exit_layer=4", {}, (9, 0), "cascade on CUDA devices is not supported"),
    (SCHEDULE, {}, (9, 0), "a schedule of layers on cuda devices is not supported"),
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


class CudaPlatform:
    """What the checks ask of vLLM's platform."""

    def __init__(self, capability: tuple[int, int] | None, rocm: bool = False) -> None:
        self.capability, self.rocm = capability, rocm

    def is_cuda(self) -> bool:
        return not self.rocm

    def get_device_capability(self) -> Any:
        from vllm.platforms.interface import DeviceCapability

        return self.capability and DeviceCapability(*self.capability)


@pytest.mark.parametrize(("plugin", "change", "capability", "what"), OF_CUDA)
def test_each_unsupported_kind_of_cuda_device_is_named(
    plugin: str,
    change: dict[str, Any],
    capability: tuple[int, int] | None,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_spec_plugins.engine import support

    monkeypatch.setattr(support, "current_platform", CudaPlatform(capability))
    settings = registry.resolve(plugin)
    with pytest.raises(SettingError) as refusal:
        support.check_engine(config(device_type="cuda", **change), settings)
    assert what in str(refusal.value)
    assert "\n" not in str(refusal.value)


WINDOWS = {
    "all layers": ({}, 4096),
    "some layers": (
        {"hf_text_config": SimpleNamespace(model_type="gemma3", layer_types=["sliding_attention", "full_attention"])},
        512,
    ),
}


@pytest.mark.parametrize(("change", "window"), WINDOWS.values(), ids=WINDOWS)
def test_sliding_windows_are_served_where_no_draft_has_caches_beside_them(change: dict[str, Any], window: int) -> None:
    from vllm_spec_plugins.engine.support import check_engine

    def model(window: int) -> Any:
        return config(get_sliding_window=lambda: window, **change)

    for plugin in ("lookahead", "jacobi", "none"):
        check_engine(model(window), registry.resolve(plugin))
    refused = {
        "specinfer:model=a/b": "a draft for a model with sliding-window attention (some/model) is not supported; use lookahead",
        "self-draft:exit_layer=4": "a draft for a model with sliding-window attention (some/model) is not supported",
        "lookahead:window=0 & self-draft:exit_layer=4": "a draft for a model with sliding-window attention",
        SCHEDULE: "a model with sliding-window attention (some/model) is not supported; serve it without --plugin",
    }
    for plugin, what in refused.items():
        with pytest.raises(SettingError, match=re.escape(what)):
            check_engine(model(window), registry.resolve(plugin))
    with pytest.raises(
        SettingError, match=r"a sliding window of 256 tokens \(some/model\).*; trees need more than 256:"
    ):
        check_engine(model(256), registry.resolve("lookahead"))
    with pytest.raises(SettingError, match=r"a sliding window of 300 tokens .*; trees need more than 310:"):
        check_engine(model(300), registry.resolve("lookahead:window=30,ngram=10,nodes=40"))


def test_layers_without_windows_are_what_they_are_whatever_the_model_could_have() -> None:
    from vllm_spec_plugins.engine.support import check_engine

    unused = SimpleNamespace(model_type="qwen2", layer_types=["full_attention"])
    check_engine(config(get_sliding_window=lambda: 128, hf_text_config=unused), registry.resolve(SCHEDULE))


@pytest.mark.parametrize(
    "plugin", ["lookahead", "jacobi", "specinfer:model=a/b", "lookahead:window=0 & medusa:model=a/b"]
)
def test_cuda_devices_of_capability_8_are_served_and_rocm_is_not(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine import support

    settings = registry.resolve(plugin)
    monkeypatch.setattr(support, "current_platform", CudaPlatform((8, 0)))
    for cache_dtype in ("auto", "bfloat16", "fp8", "fp8_e4m3"):
        cuda = config(device_type="cuda", cache_dtype=cache_dtype)
        assert list(support._unsupported_by_trees(cuda, settings)) == []
    monkeypatch.setattr(support, "current_platform", CudaPlatform((9, 0), rocm=True))
    ((what, _),) = support._unsupported_by_trees(config(device_type="cuda"), settings)
    assert what == "tree attention on ROCm devices"


@pytest.mark.parametrize("interpreted", [True, False])
def test_8_bit_caches_are_served_where_trees_are_verified_by_triton(
    interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_spec_plugins import compiled
    from vllm_spec_plugins.engine import support

    monkeypatch.setattr(compiled, "use_kernels", interpreted)
    for cache_dtype in ("fp8", "fp8_e4m3"):
        of_trees = support._unsupported_by_trees(config(cache_dtype=cache_dtype), registry.resolve("lookahead"))
        refused = (f"--kv-cache-dtype {cache_dtype}", "use --kv-cache-dtype auto or bfloat16")
        assert list(of_trees) == ([] if interpreted else [refused])
        assert list(support._unsupported_by_schedules(config(cache_dtype=cache_dtype))) == [refused]


def test_the_triton_backend_is_chosen_on_cuda_and_another_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_spec_plugins.engine import support

    def chosen(plugin: str, backend: Any = None, **of_config: Any) -> Any:
        arguments = SimpleNamespace(attention_backend=backend, attention_config=AttentionConfig(**of_config))
        support.choose_attention(arguments, registry.resolve(plugin))
        return arguments.attention_backend

    assert chosen("lookahead") is None, "on a CPU nothing is chosen"
    monkeypatch.setattr(support, "current_platform", CudaPlatform((9, 0)))
    triton = AttentionBackendEnum.TRITON_ATTN
    assert chosen("lookahead") == chosen("lookahead", "auto") == chosen("lookahead", "triton_attn") == triton
    assert chosen("none", "FLASH_ATTN") == "FLASH_ATTN"
    for given, flag in (
        ({"backend": "FLASH_ATTN"}, "--attention-backend FLASH_ATTN"),
        (
            {"backend_per_kind": {"full_attention": "FLASHINFER"}},
            "--attention-config.backend_per_kind.full_attention FLASHINFER",
        ),
    ):
        with pytest.raises(SettingError, match=f"{flag} does not verify trees; use TRITON_ATTN, or leave it out"):
            chosen("lookahead", **given)


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
