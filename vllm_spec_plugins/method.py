# SPDX-License-Identifier: Apache-2.0
"""What a method is, and what it may know of the engine and of the models that it is made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_spec_plugins.config import Settings
from vllm_spec_plugins.layers.exit_policy import ExitPolicy
from vllm_spec_plugins.layers.planner import Planner
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.proposers.base import Count, Counting, DraftModel, Proposer
from vllm_spec_plugins.tree.accept import AcceptRule


@dataclass(frozen=True)
class Surroundings:
    """What a proposer may know of the engine that it is built for.

    `dtype` is that of the target's hidden states, `num_layers` its depth. `weights` reads a checkpoint's tensors by path or hub
    id, `draft` makes a draft model for trees of so many nodes and `shallow` one of part of the target, with a policy that stops
    it, or judges it; they are None where only the shape of the trees is asked for.
    """

    max_requests: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32
    weights: Callable[[str], Iterable[tuple[str, torch.Tensor]]] | None = None
    draft: Callable[[str, int], DraftModel] | None = None
    shallow: Callable[[Planner, ExitPolicy | None, bool], DraftModel] | None = None
    judge: ExitPolicy | None = None  # of a cascade whose rule is one
    num_layers: int = 0


@dataclass(frozen=True)
class Draft:
    """What is known of a draft model before it is loaded; `same_tokens`: its tokenizer gives the target's token ids."""

    vocab_size: int
    max_model_len: int
    same_tokens: bool


# For a proposer of which only the shape and the kind are asked.
SMALLEST = Surroundings(1, max_model_len=1, vocab_size=1, eos_token_ids=(), device=torch.device("cpu"))


@dataclass(frozen=True)
class Target:
    """What is known of the target model before it is loaded; `shapes` reads those of a checkpoint's tensors, `draft` what
    another model is. Both raise ValueError with what is wrong.
    """

    hidden_size: int
    vocab_size: int
    max_model_len: int
    num_layers: int
    lora: bool
    shapes: Callable[[str], Mapping[str, tuple[int, ...]]]
    draft: Callable[[str], Draft]

    @property
    def size(self) -> dict[str, int]:
        """What tells it from other models."""
        return {"hidden_size": self.hidden_size, "vocab_size": self.vocab_size, "num_layers": self.num_layers}


LOSSY = Count("lossy_tokens", "Accepted tokens that the target had not drawn.")


@dataclass(frozen=True)
class Method:
    """A named way to serve: its settings, what proposes trees, and what accepts from them.

    settings    validated settings class; carries the name
    proposer    settings, surroundings -> Proposer; None: no speculation
    rule        settings -> AcceptRule
    slots       settings -> K/V slots behind the root that its draft models write to
    check       settings, target: raises SettingError when they do not fit together; before the engine's processes start
    schedule    settings, layers of the model -> Schedule, where rows run part of the layers; raises SettingError. LOSSY
    devices     kinds of devices that its proposer has code for
    """

    settings: type[Settings]
    proposer: Callable[[Any, Surroundings], Proposer] | None
    rule: Callable[[Any], AcceptRule]
    check: Callable[[Any, Target], None] | None = None
    slots: Callable[[Any], int] = lambda _: 0
    schedule: Callable[[Any, int], Schedule] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def shape(self, settings: Settings) -> tuple[int, int]:
        """Nodes per tree without the root, and the depth of the deepest; (0, 0) without speculation."""
        proposer = self._smallest(settings)
        return (0, 0) if proposer is None else (proposer.num_nodes, proposer.max_depth)

    def counts(self, settings: Settings) -> tuple[Count, ...]:
        """What is counted beside acceptance: by the proposer, then by a lossy rule."""
        proposer = self._smallest(settings)
        own = proposer.counts if isinstance(proposer, Counting) else ()
        return own if self.rule(settings).lossless else (*own, LOSSY)

    def _smallest(self, settings: Settings) -> Proposer | None:
        if self.proposer is None:
            return None
        return self.proposer(settings, SMALLEST)
