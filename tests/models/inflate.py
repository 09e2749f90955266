# SPDX-License-Identifier: Apache-2.0
"""Makes a larger checkpoint that computes the same function: the cost of a big model, the behaviour of a trained one.

    python tests/models/inflate.py tests/models/target big --hidden 1024 --intermediate 4096 --layers 24 \\
        --heads 16 --kv-heads 8 --head-dim 64

What is added either reads zeros, or writes zeros, so logits stay equal within rounding:

* hidden channels: embeddings, `o_proj` and `down_proj` write zeros there. RMSNorm now averages over D instead of d
  channels; weights times sqrt(d / D) and eps times d / D undo that exactly.
* MLP units and attention heads: the columns of `down_proj` / `o_proj` that would read them are zero.
* head_dim times m: the old rotary pair i becomes pair i * m, which turns at the same frequency; the new dimensions of q
  are zero, and q times sqrt(m) undoes the softmax scale.
* layers: `o_proj` and `down_proj` are zero. They are spread evenly, so an exit after half of the layers stays there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` in the upper left corner of zeros."""
    out = tensor.new_zeros(shape)
    out[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


def _scale(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor in the tensor's dtype where that is exact, else in float32."""
    exact = tensor.double() * factor
    narrow = exact.to(tensor.dtype)
    return narrow if torch.equal(narrow.double(), exact) else exact.float()


def _place(tensor: Tensor, shape: tuple[int, int], rows: Tensor, columns: Tensor, background: Tensor | None) -> Tensor:
    """tensor[i, j] at (rows[i], columns[j]) of zeros, or of `background` [shape] whose rows in use are zeroed first."""
    out = tensor.new_zeros(shape) if background is None else background.to(tensor.dtype)
    out[rows] = 0
    out[rows[:, None], columns[None, :]] = tensor
    return out


class _Plan:
    """Old and new sizes of a Llama, and where each old row goes."""

    def __init__(self, old: dict, **wanted: int | None) -> None:
        self.old = old
        self.new = dict(old)
        for key, value in wanted.items():
            if value is not None:
                if value < old[key]:
                    raise ValueError(f"{key}={value} is smaller than the checkpoint's {old[key]}")
                self.new[key] = value
        o, n = self.old, self.new
        if n["head_dim"] % o["head_dim"]:
            raise ValueError(f"head_dim={n['head_dim']} is not a multiple of the checkpoint's {o['head_dim']}")
        if n["num_attention_heads"] % n["num_key_value_heads"]:
            raise ValueError(
                f"{n['num_attention_heads']} heads do not divide among {n['num_key_value_heads']} KV heads"
            )
        if n["hidden_size"] % n["num_attention_heads"]:  # transformers would refuse the checkpoint
            raise ValueError(f"hidden_size={n['hidden_size']} is not a multiple of {n['num_attention_heads']} heads")
        group = o["num_attention_heads"] // o["num_key_value_heads"]
        new_group = n["num_attention_heads"] // n["num_key_value_heads"]
        # A smaller group than before needs copies of a KV head, so that each old query head still meets its own.
        self.copies = math.ceil(group / new_group)
        if self.copies * o["num_key_value_heads"] > n["num_key_value_heads"]:
            raise ValueError(
                f"{n['num_attention_heads']} heads on {n['num_key_value_heads']} KV heads have no room for "
                f"{o['num_attention_heads']} heads on {o['num_key_value_heads']}: use more KV heads, or larger groups"
            )
        kv_slots, q_slots = [], []
        for k in range(o["num_key_value_heads"]):
            kv_slots += [k * self.copies + c for c in range(self.copies)]
            q_slots += [(k * self.copies + j // new_group) * new_group + j % new_group for j in range(group)]
        m, half = n["head_dim"] // o["head_dim"], o["head_dim"] // 2
        pairs = torch.arange(half) * m
        within = torch.cat((pairs, pairs + n["head_dim"] // 2))
        self.q_scale = math.sqrt(m)
        self.q_rows = torch.cat([slot * n["head_dim"] + within for slot in q_slots])
        self.kv_rows = torch.cat([slot * n["head_dim"] + within for slot in kv_slots])
        # Rows of whole heads in use: even their new dimensions have to stay zero.
        span = torch.arange(n["head_dim"])
        self.q_used = torch.cat([slot * n["head_dim"] + span for slot in q_slots])
        self.kv_used = torch.cat([slot * n["head_dim"] + span for slot in kv_slots])
        self.norm_scale = math.sqrt(o["hidden_size"] / n["hidden_size"])
        layers, new_layers = o["num_hidden_layers"], n["num_hidden_layers"]
        self.layer_of = {i * new_layers // layers: i for i in range(layers)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        n = self.new
        q, kv = n["num_attention_heads"] * n["head_dim"], n["num_key_value_heads"] * n["head_dim"]
        hidden, units = n["hidden_size"], n["intermediate_size"]
        return {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (units, hidden),
            "mlp.up_proj": (units, hidden),
            "mlp.down_proj": (hidden, units),
        }

    def matrix(self, name: str, tensor: Tensor, background: Tensor | None) -> Tensor:
        """The inflated projection `name`."""
        shape = self.shapes()[name]
        columns, rows = torch.arange(tensor.shape[1]), torch.arange(tensor.shape[0])
        if name == "self_attn.q_proj":
            rows, tensor = self.q_rows, _scale(tensor, self.q_scale)
        elif name in ("self_attn.k_proj", "self_attn.v_proj"):
            per_head = tensor.unflatten(0, (self.old["num_key_value_heads"], -1))
            rows, tensor = self.kv_rows, per_head.repeat_interleave(self.copies, 0).flatten(0, 1)
        elif name == "self_attn.o_proj":
            columns = self.q_rows
        if background is not None and name.startswith("self_attn."):
            background[self.q_used if name == "self_attn.q_proj" else self.kv_used] = 0
        return _place(tensor, shape, rows, columns, background)


def _inflate_llama(config: dict, tensors: dict[str, Tensor], plan: _Plan, fill_std: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = plan.new["hidden_size"]
    out = {"model.norm.weight": _pad(_scale(tensors["model.norm.weight"], plan.norm_scale), (hidden,))}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            out[name] = _pad(tensors[name], (tensors[name].shape[0], hidden))

    def background(name: str, shape: tuple[int, int]) -> Tensor | None:
        """Values for what reads zeros or is read by nobody; what writes to the residual stream must be zero."""
        if not fill_std or name.endswith(("o_proj", "down_proj")):
            return None
        return torch.randn(shape, generator=generator) * fill_std

    dtype = tensors["model.embed_tokens.weight"].dtype
    for i in range(plan.new["num_hidden_layers"]):
        source = plan.layer_of.get(i)
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = torch.ones(plan.old["hidden_size"], dtype=dtype)
            if source is not None:
                norm = tensors[f"model.layers.{source}.{name}.weight"]
            out[f"model.layers.{i}.{name}.weight"] = _pad(_scale(norm, plan.norm_scale), (hidden,))
        for name, shape in plan.shapes().items():
            filled = background(name, shape)
            if source is None:
                new = torch.zeros(shape, dtype=dtype) if filled is None else filled.to(dtype)
            else:
                new = plan.matrix(name, tensors[f"model.layers.{source}.{name}.weight"], filled)
            out[f"model.layers.{i}.{name}.weight"] = new
    return out


def _inflate_medusa(tensors: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """Medusa heads see the normed hidden state: the old channels unchanged, the new ones zero."""
    return {
        name: _pad(t, (hidden, hidden) if name.startswith("blocks.") else (t.shape[0], hidden))
        for name, t in tensors.items()
    }


def inflate(
    src: Path | str,
    dst: Path | str,
    *,
    hidden: int | None = None,
    intermediate: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    fill_std: float = 0.0,
) -> Path:
    """Write to `dst` a checkpoint with the given sizes (default: unchanged) and the function of the one in `src`.

    `src` holds a Llama (config.json, one model.safetensors, no biases), or Medusa heads in vLLM's layout, for which
    only `hidden` may be given. Tokenizer files are copied. `fill_std` > 0 puts normal noise (seed 0) where values do
    not matter, so that a benchmark does not multiply zeros. Tensors whose rescaling is not exact in the source's dtype
    are stored in float32: load with that dtype for equality within its rounding.

    Raises ValueError for a size below the checkpoint's, for heads that cannot be laid out, and for other architectures.
    """
    src, dst = Path(src), Path(dst)
    if src.resolve() == dst.resolve():
        raise ValueError(f"source and destination are the same folder: {src}")
    config = json.loads((src / CONFIG).read_text())
    tensors = load_file(src / WEIGHTS)
    kind = config.get("model_type")
    if kind == "medusa":
        if any(v is not None for v in (intermediate, layers, heads, kv_heads, head_dim)):
            raise ValueError("Medusa heads have no size but hidden")
        new_config = {**config, "hidden_size": hidden or config["hidden_size"]}
        if new_config["hidden_size"] < config["hidden_size"]:
            raise ValueError(f"hidden={hidden} is smaller than the checkpoint's {config['hidden_size']}")
        new_tensors = _inflate_medusa(tensors, new_config["hidden_size"])
    elif kind == "llama" and not config.get("attention_bias") and not config.get("mlp_bias"):
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        plan = _Plan(
            config,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
        )
        new_config = dict(plan.new)
        new_config["rms_norm_eps"] = config["rms_norm_eps"] * config["hidden_size"] / new_config["hidden_size"]
        new_tensors = _inflate_llama(config, tensors, plan, fill_std)
    else:
        raise ValueError(f"cannot inflate model_type {kind!r}: a Llama without biases, or Medusa heads, is needed")

    dst.mkdir(parents=True, exist_ok=True)
    for file in src.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, CONFIG):
            shutil.copyfile(file, dst / file.name)
    (dst / CONFIG).write_text(json.dumps(new_config, indent=2) + "\n")
    save_file({name: t.contiguous() for name, t in new_tensors.items()}, dst / WEIGHTS, metadata={"format": "pt"})
    return dst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("src", type=Path, help="checkpoint to start from")
    parser.add_argument("dst", type=Path, help="folder to write")
    for name in ("hidden", "intermediate", "layers", "heads", "kv-heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int, help="new size; left out: unchanged")
    parser.add_argument("--fill-std", type=float, default=0.0, help="noise where values do not matter")
    args = vars(parser.parse_args())
    src, dst = args.pop("src"), args.pop("dst")
    print(inflate(src, dst, **args))


if __name__ == "__main__":
    main()
