# SPDX-License-Identifier: Apache-2.0
"""Inflated checkpoints compute what the small ones compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.inflate import inflate

TARGET = Path(__file__).resolve().parents[1] / "models" / "target"
# fp32 rounding through a few layers, relative to the largest logit. Leaving out any correction gives 1e-2 and more.
TOLERANCE = 2e-5
EVERYTHING = {"hidden": 120, "intermediate": 160, "layers": 5, "heads": 12, "kv_heads": 6, "head_dim": 32}
SIZES = {
    "a wider MLP": {"intermediate": 96},
    "more hidden channels": {"hidden": 80},
    "four times the hidden channels": {"hidden": 192},
    "more layers": {"layers": 7},
    "more heads per KV head": {"heads": 8},
    "more KV heads": {"heads": 8, "kv_heads": 4},
    "no grouping": {"heads": 4, "kv_heads": 4},
    "smaller groups and spare heads": {"hidden": 54, "heads": 9, "kv_heads": 9},
    "wider heads": {"head_dim": 24},
    "everything": EVERYTHING,
    "everything, filled with noise": EVERYTHING | {"fill_std": 0.3},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a large eps and uneven norm weights, so that every correction shows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=0.1,
            max_position_embeddings=64,
            tie_word_embeddings=request.param,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.15)
    path = tmp_path_factory.mktemp("small")
    model.save_pretrained(path)
    return path


def logits(path: Path, ids: Tensor) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(ids).logits


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_random_llama_keeps_its_logits(small: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    big = inflate(small, tmp_path / "big", **sizes)  # type: ignore[arg-type]
    assert (big / "model.safetensors").stat().st_size > (small / "model.safetensors").stat().st_size
    assert relative_difference(logits(small, ids), logits(big, ids)) < TOLERANCE


def test_the_trained_target_keeps_its_logits_under_every_inflation_at_once(tmp_path: Path) -> None:
    ids = torch.randint(3, 4096, (1, 48), generator=torch.Generator().manual_seed(2))
    sizes = {"hidden": 384, "intermediate": 640, "layers": 12, "heads": 16, "kv_heads": 8, "head_dim": 64}
    big = inflate(TARGET, tmp_path / "big", **sizes, fill_std=0.02)
    assert relative_difference(logits(TARGET, ids), logits(big, ids)) < TOLERANCE
    assert (big / "tokenizer.json").read_bytes() == (TARGET / "tokenizer.json").read_bytes()


def test_an_early_exit_stays_at_the_same_share_of_the_depth(small: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    big = inflate(small, tmp_path / "big", layers=9)
    states = []
    for path in (small, big):
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            states.append(model.model(ids, output_hidden_states=True).hidden_states)
    for exit_layer in (1, 2):
        torch.testing.assert_close(states[0][exit_layer], states[1][3 * exit_layer])


@pytest.mark.parametrize("spoil", ["eps", "norm", "q_proj", "o_proj"])
def test_the_comparison_notices_each_missing_correction(small: Path, tmp_path: Path, spoil: str) -> None:
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    big = inflate(small, tmp_path / "big", hidden=80, heads=8, head_dim=16)
    if spoil == "eps":
        config = json.loads((big / "config.json").read_text())
        config["rms_norm_eps"] = 0.1
        (big / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(big / "model.safetensors")
        for name, tensor in tensors.items():
            if spoil == "o_proj" and spoil in name:
                tensor += 0.01
            elif spoil in name:
                tensor *= 1.01
        save_file(tensors, big / "model.safetensors", metadata={"format": "pt"})
    assert relative_difference(logits(small, ids), logits(big, ids)) > 50 * TOLERANCE


def test_medusa_heads_follow_a_wider_target(tmp_path: Path) -> None:
    torch.manual_seed(4)
    src = tmp_path / "heads"
    src.mkdir()
    tensors = {"blocks.0.layers.0.weight": torch.randn(8, 8), "lm_heads.0.weight": torch.randn(11, 8)}
    save_file(tensors, src / "model.safetensors")
    (src / "config.json").write_text(json.dumps({"model_type": "medusa", "hidden_size": 8}))
    wide = load_file(inflate(src, tmp_path / "wide", hidden=20) / "model.safetensors")
    x = torch.randn(5, 8)

    def head(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        w1, w2 = weights["blocks.0.layers.0.weight"], weights["lm_heads.0.weight"]
        return (x + torch.nn.functional.silu(x @ w1.T)) @ w2.T

    torch.testing.assert_close(head(torch.nn.functional.pad(x, (0, 12)), wide), head(x, tensors))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 32}, "hidden_size=32 is smaller than the checkpoint's 48"),
        ({"head_dim": 12}, "not a multiple of the checkpoint's 8"),
        ({"heads": 6, "kv_heads": 4}, "do not divide"),
        ({"heads": 4, "kv_heads": 2, "layers": 2}, "num_hidden_layers=2 is smaller"),
        ({"heads": 10}, "hidden_size=48 is not a multiple of 10 heads"),
        ({"heads": 3}, "num_attention_heads=3 is smaller"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(
    small: Path, tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inflate(small, tmp_path / "big", **sizes)  # type: ignore[arg-type]


def test_heads_without_room_for_the_old_groups_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 144, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "intermediate_size": 8, **sizes}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="9 heads on 3 KV heads have no room for 8 heads on 2"):
        inflate(tmp_path, tmp_path / "big", heads=9, kv_heads=3)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot inflate model_type 'opt'"):
        inflate(tmp_path, tmp_path / "big", hidden=64)
