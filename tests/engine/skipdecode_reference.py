# SPDX-License-Identifier: Apache-2.0
"""SkipDecode as the paper has it (arXiv 2307.02628, section 3), in plain PyTorch: one request, one token at a time.

Every layer keeps the keys and values of the tokens that ran it, in a list. It shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.llama import NORMS, PROJECTIONS, Llama, rms_norm, rotate


class Reference:
    """Greedy text of a Llama whose i-th generated token, going in, runs `budget(i)` layers, `warmup` of them at the bottom."""

    def __init__(self, model: Llama, warmup: int, budget: Callable[[int], int]) -> None:
        self.model, self.warmup, self.budget = model, warmup, budget
        self.layers = [
            [model[f"model.layers.{i}.{name}.weight"] for name in (*NORMS, *PROJECTIONS)]
            for i in range(model.shape.layers)
        ]

    @torch.inference_mode()
    def text(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The `max_tokens` token ids behind the prompt."""
        count = len(self.layers)
        cache: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        tokens, found = list(prompt), 0
        for position in range(len(prompt) + max_tokens - 1):
            place = position - len(prompt)
            layers = list(range(count))
            if place >= 0:
                top = self.budget(place) - self.warmup
                layers = [*range(self.warmup), *range(count - top, count)]
            found = self._token(tokens[position], position, layers, cache)
            if position >= len(prompt) - 1:
                tokens.append(found)
        return tokens[len(prompt) :]

    def _token(self, token: int, position: int, layers: list[int], cache: list[list[tuple[Tensor, Tensor]]]) -> int:
        model, dim = self.model, self.model.shape.head_dim
        cos, sin = model.cos[position], model.sin[position]  # type: ignore[index]
        x = model["model.embed_tokens.weight"][token]
        for number in layers:
            norm, norm_mlp, wq, wk, wv, wo, gate, up, down = self.layers[number]
            y = rms_norm(x, norm)
            q, k, v = ((weight @ y).view(-1, dim) for weight in (wq, wk, wv))
            cache[number].append((rotate(k, cos, sin), v))
            keys, values = (torch.stack(each, 1) for each in zip(*cache[number], strict=True))  # [G, tokens, D]
            shared = len(q) // len(k)
            keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
            scores = (keys @ rotate(q, cos, sin).unsqueeze(2)).squeeze(2) * dim**-0.5
            attended = (scores.softmax(1).unsqueeze(1) @ values).flatten()
            x = x + wo @ attended
            y = rms_norm(x, norm_mlp)
            x = x + down @ (F.silu(gate @ y) * (up @ y))
        return int((model.head @ rms_norm(x, model.norm)).argmax())
