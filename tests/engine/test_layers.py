# SPDX-License-Identifier: Apache-2.0
"""Part of a model is that part: for every kind of decoder layer in use, against models from which the rest was taken out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_spec_plugins.layers.plan import LayerPlan

LAYERS = 4
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
GATED = {**COMMON, **HEADS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
GEMMA = {**GATED, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
OPT = {**COMMON, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", **GATED},
    "MistralForCausalLM": {"model_type": "mistral", **GATED, "sliding_window": None},
    "Qwen2ForCausalLM": {"model_type": "qwen2", **GATED},
    "Qwen3ForCausalLM": {"model_type": "qwen3", **GATED},
    "GemmaForCausalLM": {"model_type": "gemma", **GEMMA},
    "Gemma2ForCausalLM": {
        "model_type": "gemma2", **GEMMA, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 4096, "layer_types": ["full_attention"] * LAYERS,
    },
    "OPTForCausalLM": {"model_type": "opt", **OPT, "do_layer_norm_before": True},
    "GPT2LMHeadModel": {
        "model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
    },
    "GPTNeoXForCausalLM": {"model_type": "gpt_neox", **COMMON, **HEADS, "use_parallel_residual": True},
    "CohereForCausalLM": {"model_type": "cohere", **GATED, "layer_norm_eps": 1e-5, "use_qk_norm": False},
    "StableLmForCausalLM": {"model_type": "stablelm", **GATED, "layer_norm_eps": 1e-5},
}  # fmt: skip
UNKNOWN = ("GPTNeoXForCausalLM", "StableLmForCausalLM")
REFUSED = {
    "a model of transformers'": ("GPTNeoXForCausalLM", {}, "has no list of decoder layers"),
    "OPT-350M's order": ("OPTForCausalLM", {"do_layer_norm_before": False}, "do more to the residual stream"),
    "StableLM's tuple": ("StableLmForCausalLM", {}, "return"),
}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a model of random weights and its configuration. Attention is replaced by a running mean of the values."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    def attention(self: Attention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        value = value.view(len(query), self.num_kv_heads, -1)
        mean = value.cumsum(0) / torch.arange(1, len(query) + 1)[:, None, None]
        return mean.repeat_interleave(self.num_heads // self.num_kv_heads, 1).flatten(1)

    monkeypatch.setattr(Attention, "forward", attention)

    def make(architecture: str, without: LayerPlan | None = None, **changes: Any) -> Any:
        config = {"architectures": [architecture], "torch_dtype": "float32", **CONFIGS[architecture], **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        args = EngineArgs(
            str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", load_format="dummy"
        )
        vllm_config = args.create_engine_config()
        with set_current_vllm_config(vllm_config):
            if not torch.distributed.is_initialized():
                parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
            model = initialize_model(vllm_config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(generator=generator).mul_(0.3)
        for number, layer in enumerate(decoder(model)[2] if without else ()):
            for block, runs in (("attn", without.attention), ("mlp", without.mlp)):
                last = [m for name, m in layer.named_modules() if is_last(name, block)]
                for parameter in last[-1].parameters() if not runs[number] else ():
                    parameter.data.zero_()
        process_weights_after_loading(model, vllm_config.model_config, torch.device("cpu"))
        return model, vllm_config

    return make


def decoder(model: nn.Module) -> tuple[Any, str, nn.ModuleList]:
    """The module that holds the decoder layers, the attribute and the list."""
    owner = next(m for m in model.modules() if hasattr(m, "start_layer"))
    return owner, *next((n, c) for n, c in owner.named_children() if isinstance(c, nn.ModuleList))


def run(model: nn.Module, config: Any) -> Tensor:
    tokens, places = torch.arange(7) * 5 % 64, torch.arange(7)
    with torch.inference_mode(), set_context(config):
        return model(input_ids=tokens, positions=places, intermediate_tensors=None)


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in UNKNOWN])
def test_part_of_a_model_is_the_model_without_the_rest(build: Callable[..., Any], architecture: str) -> None:
    from vllm_spec_plugins.engine.layers import Layers

    model, config = build(architecture)
    layers = Layers(model, config)
    whole = run(model, config)

    with layers.running(LayerPlan.full(LAYERS)):
        assert torch.equal(run(model, config), whole)

    owner, name, full = decoder(model)
    for kept in ([0, 1], [1, 2], [0, 3], [3]):
        with layers.running(LayerPlan.of_layers(LAYERS, kept)):
            part = run(model, config)
        setattr(owner, name, nn.ModuleList([full[i] for i in kept]))
        owner.end_layer = len(kept)
        assert torch.equal(part, run(model, config)), kept
        assert not torch.allclose(part, whole)
        setattr(owner, name, full)
        owner.end_layer = LAYERS

    plan = LayerPlan.skipping(LAYERS, attention=[1, 2], mlp=[0, 2])
    with layers.running(plan):
        part = run(model, config)
    assert torch.allclose(part, run(*build(architecture, without=plan)), atol=1e-5)
    assert not torch.allclose(part, whole)


def is_last(name: str, block: str) -> bool:
    """Whether a module is a block's last matrix, by its name in the models above."""
    if block == "attn":
        return name.split(".")[0] in ("self_attn", "attn", "attention") and name.split(".")[-1] in (
            "o_proj", "out_proj", "c_proj", "dense",
        )  # fmt: skip
    return name.split(".")[-1] in ("down_proj", "fc2", "dense_4h_to_h") or name == "mlp.c_proj"


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_run_in_part_is_refused_by_name(build: Callable[..., Any], case: str) -> None:
    from vllm_spec_plugins.engine.layers import Layers, UnsupportedModel

    architecture, changes, sentence = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=sentence):
        Layers(*build(architecture, **changes))


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in UNKNOWN])
@pytest.mark.parametrize("first", [0, 1])
def test_a_layer_that_runs_on_some_rows_leaves_the_others_as_they_were(
    build: Callable[..., Any], architecture: str, first: int
) -> None:
    from vllm_spec_plugins.engine.layers import HIDDEN, POSITIONS, RESIDUAL, Layers

    model, config = build(architecture)
    layers = Layers(model, config)
    layers.check_rows()
    seen: list[Tensor] = []

    def remember(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        seen.append(layers.stream(output[0]) if output else layers.bind(args, kwargs)[HIDDEN].clone())

    layers.layers[0].register_forward_pre_hook(remember, with_kwargs=True)
    layers.layers[-1].register_forward_hook(remember, with_kwargs=True)
    # Neighbours on different rows, a layer on none, the last on all.
    rows = {first: torch.tensor([0, 1, 4]), first + 1: torch.tensor([0, 4])}
    rows |= {2 - 2 * first: torch.tensor([], dtype=torch.int64)}
    with layers.running_rows(rows):
        run(model, config)
    assert not any("forward" in vars(module) for module in model.modules())

    stream, found = seen
    assert stream.shape == found.shape
    places = torch.arange(7)
    with torch.inference_mode(), set_context(config):
        for number, layer in enumerate(layers.layers):
            some = rows.get(number, places)
            if len(some):
                given = {HIDDEN: stream[some], RESIDUAL: None} | dict.fromkeys(POSITIONS, places[some])
                output = layer(**{p.name: given[p.name] for p in layers.parameters if p.name in given})
                seen.clear()
                stream = stream.index_copy(0, some, layers.stream(output))
    assert torch.allclose(found, stream, atol=1e-5)


def set_context(config: Any) -> Any:
    from vllm.forward_context import set_forward_context

    return set_forward_context(None, config, skip_compiled=True)


def test_a_model_whose_rows_cannot_be_chosen_is_refused(build: Callable[..., Any]) -> None:
    from vllm_spec_plugins.engine.layers import Layers, UnsupportedModel

    model, config = build("LlamaForCausalLM")
    layers = Layers(model, config)
    with (
        layers.running_rows({0: torch.tensor([0])}),
        pytest.raises(UnsupportedModel, match="are given scaling, of which"),
    ):
        layers.layers[0](positions=None, hidden_states=None, residual=None, scaling=2.0)
    shared = config.compilation_config.static_forward_context[layers.names[2]]
    shared.kv_sharing_target_layer_name = layers.names[0]
    with pytest.raises(UnsupportedModel, match="1 layers of LlamaForCausalLM read the K/V of other layers"):
        layers.check_rows()


def test_the_stream_behind_each_layer_is_what_later_layers_add_to(build: Callable[..., Any]) -> None:
    from vllm_spec_plugins.engine.layers import Layers

    model, config = build("LlamaForCausalLM")
    layers, seen = Layers(model, config), {}
    with layers.running(LayerPlan.of_layers(LAYERS, [0, 2]), after=seen.__setitem__):
        hidden = run(model, config)
    assert list(seen) == [0, 2]
    assert torch.allclose(model.model.norm(seen[2]), hidden, atol=1e-6)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "CohereForCausalLM", "OPTForCausalLM"])
def test_a_pass_can_end_from_the_stream_behind_any_layer(build: Callable[..., Any], architecture: str) -> None:
    from vllm_spec_plugins.engine.layers import Layers

    model, config = build(architecture)
    layers, seen = Layers(model, config), {}
    with layers.running(LayerPlan.full(LAYERS), after=seen.__setitem__):
        run(model, config)
    for number, stream in seen.items():
        with layers.ending(stream):
            ended = run(model, config)
        with layers.running(LayerPlan.prefix(LAYERS, number + 1)):
            assert torch.allclose(ended, run(model, config), atol=1e-5)


def test_nothing_is_left_behind_when_a_pass_fails(build: Callable[..., Any]) -> None:
    from vllm_spec_plugins.engine.layers import Layers

    model, config = build("LlamaForCausalLM")
    layers = Layers(model, config)
    with pytest.raises(ZeroDivisionError), layers.running(LayerPlan.skipping(LAYERS, mlp=[1])):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
