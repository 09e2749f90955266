# SPDX-License-Identifier: Apache-2.0
"""Medusa heads with gradients, and the folder that they are served from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class TrainableHeads(nn.Module):
    """K heads of L residual layers; at the start each is the model's own LM head (arXiv 2401.10774, section 2.1.1).

    Args:
        lm_head: [V, H], the model's.
        heads, layers: K and L.
        shared: the LM head serves all heads and is not trained.

    Attributes:
        layers: K * L matrices [H, H], those of one head behind one another.
        outs: K matrices [V, H], or the one that all share.
    """

    def __init__(self, lm_head: Tensor, heads: int, layers: int, shared: bool) -> None:
        super().__init__()
        self.count, self.depth, self.shared = heads, layers, shared
        self.vocab, self.hidden = lm_head.shape
        start = lm_head.detach().float()
        self.layers = nn.ParameterList(
            torch.zeros(self.hidden, self.hidden, device=start.device) for _ in range(heads * layers)
        )
        self.outs = nn.ParameterList(start.clone() for _ in range(1 if shared else heads))
        self.outs.requires_grad_(not shared)

    def forward(self, hidden: Tensor, head: int) -> Tensor:
        """Logits [n, V] of head `head`, 0-based, from hidden states [n, H]."""
        for weight in self.layers[head * self.depth : (head + 1) * self.depth]:
            hidden = hidden + silu(linear(hidden, weight))
        return linear(hidden, self.outs[0 if self.shared else head])

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and model.safetensors in vLLM's layout, the weights in `dtype`."""
        tensors = {
            f"blocks.{index // self.depth}.layers.{index % self.depth}.weight": weight
            for index, weight in enumerate(self.layers)
        }
        if self.shared:
            tensors["lm_head.weight"] = self.outs[0]
        else:
            tensors |= {f"lm_heads.{head}.weight": weight for head, weight in enumerate(self.outs)}
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "truncated_vocab_size": self.vocab,
            "medusa_num_heads": self.count,
            "medusa_num_layers": self.depth,
            "original_lm_head": self.shared,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        unfinished = folder / "model.safetensors.tmp"
        save_file(
            {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()},
            unfinished,
            metadata={"format": "pt"},
        )
        unfinished.chmod(0o644)
        unfinished.replace(folder / "model.safetensors")
