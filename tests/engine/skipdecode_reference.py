# SPDX-License-Identifier: Apache-2.0
"""SkipDecode as the paper has it (arXiv 2307.02628, section 3), in plain PyTorch: one request, one token at a time.

Every layer keeps the keys and values of the tokens that ran it, in a list. It shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.llama import NORMS, PROJECTIONS, Llama, rms_norm, rotate

Cache = list[list[tuple[Tensor, Tensor]]]


def falling(high: int, low: int, max_tokens: int, levels: int) -> Callable[[int], int]:
    """Layers by place: a straight line from `high` to `low`, rounded, or so many equal steps down it."""

    def budget(place: int) -> int:
        place = min(place, max_tokens - 1)
        way = Fraction(place * levels // max_tokens, levels - 1) if levels else Fraction(place, max_tokens - 1)
        return floor(high - (high - low) * way + Fraction(1, 2))

    return budget


class Decoder:
    """Greedy text of a Llama whose i-th generated token, going in, runs `budget(i)` layers, `warmup` of them at the bottom."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.layers = [
            [model[f"model.layers.{i}.{name}.weight"] for name in (*NORMS, *PROJECTIONS)]
            for i in range(model.shape.layers)
        ]
        self.prompts: dict[tuple[int, ...], tuple[Cache, Tensor]] = {}

    @torch.inference_mode()
    def text(self, prompt: list[int], max_tokens: int, warmup: int, budget: Callable[[int], int]) -> list[int]:
        """The `max_tokens` token ids behind the prompt."""
        known, x = self._prompt(tuple(prompt))
        cache, tokens = [list(each) for each in known], [self._likeliest(x)]
        while len(tokens) < max_tokens:
            place = len(tokens) - 1
            top = budget(place) - warmup
            layers = [*range(warmup), *range(len(self.layers) - top, len(self.layers))]
            x = self._token(tokens[-1], len(prompt) + place, layers, cache)
            tokens.append(self._likeliest(x))
        return tokens

    def _prompt(self, prompt: tuple[int, ...]) -> tuple[Cache, Tensor]:
        if prompt not in self.prompts:
            cache: Cache = [[] for _ in self.layers]
            for position, token in enumerate(prompt):
                x = self._token(token, position, range(len(self.layers)), cache)
            self.prompts[prompt] = cache, x
        return self.prompts[prompt]

    def _token(self, token: int, position: int, layers: list[int] | range, cache: Cache) -> Tensor:
        """The residual stream [H] behind the last layer; appends the token's keys and values [G, D] to the cache."""
        model, dim = self.model, self.model.shape.head_dim
        cos, sin = model.cos[position], model.sin[position]  # type: ignore[index]
        x = model["model.embed_tokens.weight"][token]
        for number in layers:
            norm, norm_mlp, wq, wk, wv, wo, gate, up, down = self.layers[number]
            y = rms_norm(x, norm)
            q, k, v = ((weight @ y).view(-1, dim) for weight in (wq, wk, wv))
            cache[number].append((rotate(k, cos, sin), v))
            keys, values = (torch.stack(each, 1) for each in zip(*cache[number], strict=True))
            q = rotate(q, cos, sin).view(len(k), -1, dim)  # the heads that share keys stand together
            scores = (q @ keys.transpose(1, 2)) * dim**-0.5
            x = x + wo @ (scores.softmax(2) @ values).flatten()
            y = rms_norm(x, norm_mlp)
            x = x + down @ (F.silu(gate @ y) * (up @ y))
        return x

    def _likeliest(self, x: Tensor) -> int:
        return int((self.model.head @ rms_norm(x, self.model.norm)).argmax())
