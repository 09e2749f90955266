# SPDX-License-Identifier: Apache-2.0
"""Requests with LoRA adapters: text is what plain decoding gives with the same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vllm_spec_plugins
from tests.engine.conftest import TARGET

RANK = 8


def adapter(folder: Path, seed: int) -> Path:
    """A random adapter of the attention's queries and values, as peft writes it."""
    config = json.loads((TARGET / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    outputs = {"q_proj": width, "v_proj": width // heads * config["num_key_value_heads"]}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, output in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * width**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(output, RANK, generator=generator) * 0.6
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(outputs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    return [LoRARequest(f"adapter-{i}", i, str(adapter(folder / str(i), i))) for i in (1, 2)]


def texts(llm: Any, prompts: list[list[int]], chosen: list[Any] | None) -> list[list[int]]:
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=40, temperature=i % 2 * 0.8, seed=i) for i in range(len(prompts))]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = llm.generate(requests, params, use_tqdm=False, lora_request=chosen)
    return [list(result.outputs[0].token_ids) for result in results]


def test_requests_of_several_adapters_together_equal_plain_decodings(
    engine: Callable[..., Any], adapters: list[Any], prompts: list[list[int]]
) -> None:
    served = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    plain = engine(vllm_spec_plugins.engine_args("none"), **served)
    lookahead = engine(vllm_spec_plugins.engine_args("lookahead", guesses=4, min_chance=0.0, adapt=False), **served)
    prompts = prompts[:8]
    chosen = [adapters[i // 2 % 2] for i in range(len(prompts))]
    free, bound = texts(plain, prompts, None), texts(plain, prompts, chosen)
    assert sum(a != b for a, b in zip(free, bound, strict=True)) >= 6
    assert texts(lookahead, prompts, chosen) == bound
    assert texts(lookahead, prompts, None) == free
    accepted = {metric.name: metric.value for metric in lookahead.get_metrics() if hasattr(metric, "value")}
    assert accepted["vllm:spec_decode_num_accepted_tokens"] > 0
