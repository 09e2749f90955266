# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a model run.

A decoder layer is two blocks, attention and MLP, each of which adds its output to the residual stream. A block that is
skipped adds nothing, so every subset of blocks is a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class LayerPlan:
    """The blocks of an L-layer model that run; hashable, so that a plan can be a key (of a graph, a cache).

    Attributes:
        attention: L flags, the attention blocks that run.
        mlp: L flags, the MLP blocks that run.
    """

    attention: tuple[bool, ...]
    mlp: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.mlp):
            raise ValueError(f"{len(self.attention)} attention blocks and {len(self.mlp)} MLP blocks are not layers")
        if not any(self.attention) and not any(self.mlp):
            raise ValueError("a plan runs at least one block")

    @classmethod
    def full(cls, num_layers: int) -> LayerPlan:
        """Every block."""
        return cls((True,) * num_layers, (True,) * num_layers)

    @classmethod
    def prefix(cls, num_layers: int, exit_layer: int) -> LayerPlan:
        """The first `exit_layer` layers (LayerSkip's early exit, arXiv 2404.16710)."""
        return cls.of_layers(num_layers, range(exit_layer))

    @classmethod
    def of_layers(cls, num_layers: int, layers: Collection[int]) -> LayerPlan:
        """Both blocks of `layers`. Raises ValueError when there is no such layer."""
        runs = tuple(layer in layers for layer in range(num_layers))
        if sum(runs) < len(set(layers)):
            raise ValueError(f"there is no layer {max(layers)} in a model of {num_layers}")
        return cls(runs, runs)

    @classmethod
    def skipping(cls, num_layers: int, attention: Collection[int] = (), mlp: Collection[int] = ()) -> LayerPlan:
        """All blocks but these (Draft & Verify, arXiv 2309.08168). Raises ValueError when there is no such layer."""
        for layer in (*attention, *mlp):
            if not 0 <= layer < num_layers:
                raise ValueError(f"there is no layer {layer} in a model of {num_layers}")
        every = range(num_layers)
        return cls(tuple(i not in attention for i in every), tuple(i not in mlp for i in every))

    @classmethod
    def parse_skip(cls, text: str, num_layers: int) -> LayerPlan:
        """The plan without the blocks of `3-4a-5m`: all of layer 3, attention of 4, MLP of 5. Raises ValueError, whose message
        goes on from the text.
        """
        skipped: dict[str, list[int]] = {"a": [], "m": []}
        for item in text.split("-"):
            if not (found := re.fullmatch(r"(\d+)([am]?)", item.strip())):
                raise ValueError(f"holds {item!r}; write layers with dashes between, as 3-4a-5m")
            if int(found[1]) >= num_layers:
                raise ValueError(f"names layer {found[1]}; the model has layers 0 to {num_layers - 1}")
            for block in found[2] or "am":
                skipped[block].append(int(found[1]))
        return cls.skipping(num_layers, attention=skipped["a"], mlp=skipped["m"])

    @property
    def num_layers(self) -> int:
        """L, layers of the whole model."""
        return len(self.attention)

    @property
    def is_full(self) -> bool:
        """Nothing is skipped."""
        return all(self.attention) and all(self.mlp)

    @property
    def share(self) -> float:
        """Blocks that run, of all: what a forward pass costs where layers dominate and both blocks cost alike."""
        return (sum(self.attention) + sum(self.mlp)) / (2 * self.num_layers)

    @property
    def skipped(self) -> str:
        """The blocks that do not run, as `parse_skip` reads them."""
        return "-".join(
            f"{i}{'' if not attention and not mlp else 'm' if attention else 'a'}"
            for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True))
            if not (attention and mlp)
        )

    @property
    def exit_layer(self) -> int:
        """Layers up to the last one of which a block runs."""
        return max(i for i in range(self.num_layers) if self.attention[i] or self.mlp[i]) + 1

    def __str__(self) -> str:
        return " ".join(
            f"{i}" if attention and mlp else f"{i}a" if attention else f"{i}m"
            for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True))
            if attention or mlp
        )


@lru_cache(maxsize=64)
def exits_of(plan: LayerPlan, count: int) -> tuple[int, ...]:
    """The layers (from 0) behind which a pass of `plan` has its last `count` exits: the layers that run, in equal parts."""
    layers = [i for i in range(plan.num_layers) if plan.attention[i] or plan.mlp[i]]
    count = min(count, len(layers))
    return tuple(layers[len(layers) * part // count - 1] for part in range(1, count + 1))
