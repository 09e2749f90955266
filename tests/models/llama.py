# SPDX-License-Identifier: Apache-2.0
"""A compact Llama for training on CPUs. Parameter names are those of transformers, so a state dict is a checkpoint.

The decoder layer is one pure function of its weights: torch.compile makes one graph that all layers share, and a layer
is dropped by not calling it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EPS = 1e-5
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; `config()` is what transformers and vLLM read."""

    hidden: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 384
    vocab: int = 4096
    max_position: int = 2048
    rope_theta: float = 10000.0
    tied: bool = False

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": EPS,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }

    @staticmethod
    def from_config(config: dict) -> Shape:
        rope = config.get("rope_parameters") or {}
        return Shape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            max_position=config["max_position_embeddings"],
            rope_theta=config.get("rope_theta", rope.get("rope_theta", 10000.0)),
            tied=config["tie_word_embeddings"],
        )


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., seq, head_dim], cos and sin [seq, head_dim / 2]: halves, not pairs, are rotated."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, ln1: Tensor, ln2: Tensor, *weights: Tensor
) -> Tensor:
    """x [batch, seq, hidden] -> same; `weights` in the order of PROJECTIONS."""
    wq, wk, wv, wo, gate, up, down = weights
    batch, seq, _ = x.shape
    rows = (wq.shape[0], wk.shape[0], wv.shape[0])
    q, k, v = F.linear(rms_norm(x, ln1), torch.cat((wq, wk, wv))).split(rows, dim=-1)
    q, k, v = (t.view(batch, seq, -1, head_dim).transpose(1, 2) for t in (q, k, v))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, seq, -1), wo)
    g, u = F.linear(rms_norm(x, ln2), torch.cat((gate, up))).chunk(2, dim=-1)
    return x + F.linear(F.silu(g) * u, down)


def exit_loss(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy (nats) of final norm + LM head on x [n, hidden] against targets [n]."""
    return F.cross_entropy(F.linear(rms_norm(x, norm), head), targets)


class Llama(nn.Module):
    """Weights plus a forward pass that returns hidden states after chosen layers."""

    def __init__(self, shape: Shape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.layer_fn: Callable[..., Tensor] = decoder_layer
        self.loss_fn: Callable[..., Tensor] = exit_loss
        s = shape
        sizes = {
            "self_attn.q_proj": (s.heads * s.head_dim, s.hidden),
            "self_attn.k_proj": (s.kv_heads * s.head_dim, s.hidden),
            "self_attn.v_proj": (s.kv_heads * s.head_dim, s.hidden),
            "self_attn.o_proj": (s.hidden, s.heads * s.head_dim),
            "mlp.gate_proj": (s.intermediate, s.hidden),
            "mlp.up_proj": (s.intermediate, s.hidden),
            "mlp.down_proj": (s.hidden, s.intermediate),
        }
        weights: dict[str, Tensor] = {}
        for i in range(s.layers):
            for name, size in sizes.items():
                # Zero where a layer writes to the residual stream: every layer begins as the identity.
                std = 0.0 if name.endswith(("o_proj", "down_proj")) else s.hidden**-0.5
                weights[f"model.layers.{i}.{name}.weight"] = torch.randn(size, generator=generator) * std
            for name in NORMS:
                weights[f"model.layers.{i}.{name}.weight"] = torch.ones(s.hidden)
        # Tied embeddings start small: large ones would make every token predict itself.
        std = 0.02 if s.tied else 0.1
        weights["model.embed_tokens.weight"] = torch.randn(s.vocab, s.hidden, generator=generator) * std
        weights["model.norm.weight"] = torch.ones(s.hidden)
        if not s.tied:
            weights["lm_head.weight"] = torch.randn(s.vocab, s.hidden, generator=generator) * 0.005
        # ParameterDict keys may not hold dots: the names of transformers are restored by `checkpoint`.
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(w) for name, w in weights.items()})
        inverse = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        angles = torch.outer(torch.arange(s.max_position).float(), inverse)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.per_layer = [
            [self[f"model.layers.{i}.{name}.weight"] for name in (*NORMS, *PROJECTIONS)] for i in range(s.layers)
        ]

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.weights[name.replace(".", "/")]

    @property
    def head(self) -> Tensor:
        return self["model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"]

    @property
    def norm(self) -> Tensor:
        return self["model.norm.weight"]

    def compile(self) -> None:  # type: ignore[override]
        """Compile the layer and the loss, once each, for all layers and exits."""
        self.layer_fn = torch.compile(decoder_layer, dynamic=False)
        self.loss_fn = torch.compile(exit_loss, dynamic=False)

    def hidden(self, ids: Tensor, exits: Sequence[int] = (), dropped: frozenset[int] = frozenset()) -> list[Tensor]:
        """Residual stream [batch, seq, hidden] after each of `exits` layers and after the last; ids [batch, seq]."""
        x = F.embedding(ids, self["model.embed_tokens.weight"])
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # type: ignore[index]
        states = []
        for i, weights in enumerate(self.per_layer):
            if i in exits:
                states.append(x)
            if i not in dropped:
                x = self.layer_fn(x, cos, sin, self.shape.head_dim, *weights)
        return [*states, x]

    def logits(self, ids: Tensor) -> Tensor:
        """[batch, seq, vocab] float32."""
        return F.linear(rms_norm(self.hidden(ids)[-1], self.norm), self.head)

    def checkpoint(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): w.detach() for name, w in self.weights.items()}


def save_checkpoint(model: Llama, directory: Path) -> None:
    """config.json, generation_config.json and bfloat16 model.safetensors, as transformers and vLLM read them."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.to(torch.bfloat16).contiguous() for name, w in model.checkpoint().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it private to its owner
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for name, content in (("config.json", model.shape.config()), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def load_checkpoint(directory: Path) -> Llama:
    """A float32 model from a directory that `save_checkpoint` (or transformers) wrote."""
    model = Llama(Shape.from_config(json.loads((directory / "config.json").read_text())))
    tensors = load_file(directory / "model.safetensors")
    with torch.no_grad():
        for name, weight in model.checkpoint().items():
            weight.copy_(tensors[name])
    return model
