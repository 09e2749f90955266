# SPDX-License-Identifier: Apache-2.0
"""A transformers model as a target for the simulator: one forward pass per tree, prefix in a K/V cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


class ModelTarget:
    """Greedy at temperature 0, else drawn with noise keyed by (request, position).

    Args:
        path: directory of the checkpoint.
        temperature: 0 = greedy.
        dtype: float64 makes draws independent of how rows are batched, for all practical purposes.
    """

    def __init__(self, path: Path, temperature: float, dtype: torch.dtype = torch.float64) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.temperature = temperature
        self._caches: dict[int, tuple[DynamicCache, int]] = {}

    def _noise(self, request: int, position: int) -> Tensor:
        own = torch.Generator().manual_seed(request * 104729 + position)
        uniform = torch.rand(self.model.config.vocab_size, generator=own, dtype=torch.float64)
        return -torch.log(-torch.log(uniform))

    @torch.inference_mode()
    def __call__(self, request: int, text: list[int], tokens: list[int], parents: list[int]) -> list[int]:
        cache, done = self._caches.pop(request, (DynamicCache(), 0))
        if done >= len(text):
            cache, done = DynamicCache(), 0
        new, nodes, root = len(text) - done, len(tokens), len(text) - 1
        sees = torch.ones(new + nodes, done + new + nodes, dtype=torch.bool).tril(done)
        depths = [0]
        for node, parent in enumerate(parents):
            row = new + node
            sees[row] = sees[new - 1 + parent]
            sees[row, done + row] = True
            depths.append(depths[parent] + 1)
        logits = self.model(
            input_ids=torch.tensor([text[done:] + tokens]),
            position_ids=torch.tensor([[*range(done, root), *(root + depth for depth in depths)]]),
            attention_mask=sees[None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[0, new - 1 :]
        if nodes:
            cache.crop(-nodes)
        self._caches[request] = (cache, len(text))
        if self.temperature:
            logits = logits / self.temperature + torch.stack([self._noise(request, root + 1 + d) for d in depths])
        return logits.argmax(-1).tolist()

    def plain(self, request: int, prompt: list[int], max_new: int) -> list[int]:
        """Plain decoding of `max_new` tokens."""
        text = list(prompt)
        for _ in range(max_new):
            text += self(request, text, [], [])
        return text[len(prompt) :]
