# SPDX-License-Identifier: Apache-2.0
"""The methods: one line each. To add one, copy a line and write one file under proposers/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_spec_plugins.config import (
    FLAG,
    JacobiSettings,
    LookaheadSettings,
    MedusaSettings,
    NoneSettings,
    SettingError,
    Settings,
    SpeculationSettings,
    parse_plugin,
)
from vllm_spec_plugins.proposers.base import Count, Counting, Proposer
from vllm_spec_plugins.proposers.jacobi import JacobiProposer
from vllm_spec_plugins.proposers.lookahead import LookaheadProposer
from vllm_spec_plugins.proposers.medusa import HeadShapes, MedusaHeads, MedusaProposer
from vllm_spec_plugins.tree.accept import AcceptRule, Typical, Walk


@dataclass(frozen=True)
class Surroundings:
    """What a proposer may know of the engine that it is built for.

    `dtype` is that of the target's hidden states; `weights` reads a checkpoint's tensors by path or hub id, None where
    only the shape of the trees is asked for.
    """

    max_requests: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32
    weights: Callable[[str], Iterable[tuple[str, torch.Tensor]]] | None = None


@dataclass(frozen=True)
class Target:
    """What is known of the target model before it is loaded; `shapes` reads those of a checkpoint's tensors."""

    hidden_size: int
    vocab_size: int
    shapes: Callable[[str], Mapping[str, tuple[int, ...]]]


LOSSY = Count("lossy_tokens", "Accepted tokens that the target had not drawn.")


@dataclass(frozen=True)
class Method:
    """A named way to serve: its settings, what proposes trees, and what accepts from them.

    settings    validated settings class; carries the name
    proposer    settings, surroundings -> Proposer; None: no speculation
    rule        settings -> AcceptRule
    check       settings, target: raises SettingError when they do not fit together; before the engine's processes start
    """

    settings: type[Settings]
    proposer: Callable[[Any, Surroundings], Proposer] | None
    rule: Callable[[Any], AcceptRule]
    check: Callable[[Any, Target], None] | None = None

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
        smallest = Surroundings(1, max_model_len=1, vocab_size=1, eos_token_ids=(), device=torch.device("cpu"))
        return self.proposer(settings, smallest)


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Enter a method. Refuses, at once, one that lacks what the engine will ask for."""
    settings = method.settings()
    name = settings.name
    if name in METHODS:
        raise ValueError(f"method {name!r} is registered already")
    nodes, depth = method.shape(settings)
    if not 0 <= depth <= nodes:
        raise ValueError(f"method {name!r} proposes {nodes} nodes down to depth {depth}")
    rule = method.rule(settings)
    if missing := [a for a in ("name", "lossless", "needs_target") if not hasattr(rule, a)]:
        raise ValueError(f"method {name!r}: its rule lacks {', '.join(missing)}")
    METHODS[name] = method


def _lookahead(settings: LookaheadSettings, around: Surroundings) -> LookaheadProposer:
    return LookaheadProposer(
        max_requests=around.max_requests,
        device=around.device,
        window=settings.window,
        ngram=settings.ngram,
        guesses=settings.guesses,
        nodes=settings.nodes,
        draft_length=settings.draft_length,
        min_chance=settings.min_chance,
        prompt_pool=settings.prompt_pool,
        shared_pool=settings.shared_pool,
        eos_token_ids=around.eos_token_ids,
    )


def _jacobi(settings: JacobiSettings, around: Surroundings) -> JacobiProposer:
    return JacobiProposer(
        max_requests=around.max_requests,
        device=around.device,
        block=settings.block,
        mode=settings.mode,
        parallel_tokens=settings.parallel_tokens,
    )


def _medusa(settings: MedusaSettings, around: Surroundings) -> MedusaProposer:
    heads = None
    if around.weights is not None:
        tensors = around.weights(settings.model)
        heads = MedusaHeads(
            tensors, min(settings.depth, settings.nodes), around.vocab_size, around.device, around.dtype
        )
    return MedusaProposer(
        heads,
        max_requests=around.max_requests,
        device=around.device,
        nodes=settings.nodes,
        depth=settings.depth,
        ranks=settings.ranks,
        min_chance=settings.min_chance,
    )


def _check_medusa(settings: MedusaSettings, target: Target) -> None:
    try:
        found = HeadShapes.of(target.shapes(settings.model))
    except ValueError as error:
        raise SettingError(
            f"{FLAG} medusa: model={settings.model} cannot be used: {error}; give the folder or hub id of Medusa heads"
        ) from error
    if found.hidden != target.hidden_size or not target.vocab_size <= found.vocab < target.vocab_size + 1024:
        raise SettingError(
            f"{FLAG} medusa: model={settings.model} has heads for a hidden size of {found.hidden} and {found.vocab} tokens, "
            f"the target has {target.hidden_size} and {target.vocab_size}; use heads that were trained for it"
        )
    if settings.depth > found.heads:
        raise SettingError(
            f"{FLAG} medusa: depth={settings.depth} asks for more heads than the {found.heads} of {settings.model}; "
            f"use depth={found.heads} or less"
        )


def _rule(settings: SpeculationSettings) -> AcceptRule:
    if settings.accept == "typical":
        given = {key: value for key in ("eps", "delta") if (value := getattr(settings, key)) is not None}
        return Typical(**given)
    return Walk()


register(Method(NoneSettings, proposer=None, rule=lambda _: Walk()))
register(Method(LookaheadSettings, proposer=_lookahead, rule=_rule))
register(Method(JacobiSettings, proposer=_jacobi, rule=_rule))
register(Method(MedusaSettings, proposer=_medusa, rule=_rule, check=_check_medusa))


def resolve(value: str | Mapping[str, Any]) -> Settings:
    """The settings that a flag, a JSON text or a mapping asks for. Raises SettingError."""
    return parse_plugin(value, {name: method.settings for name, method in METHODS.items()})


def method_of(settings: Settings) -> Method:
    """The method that validated settings belong to."""
    return METHODS[settings.name]
