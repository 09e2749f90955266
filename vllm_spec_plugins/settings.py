# SPDX-License-Identifier: Apache-2.0
"""One validated settings class per plugin; those that decide how deep a token is computed stand in depth_settings.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar, Self

from vllm_spec_plugins import choices as tree_choices
from vllm_spec_plugins.config import FLAG, SettingError, Settings, setting


@dataclass(frozen=True)
class NoneSettings(Settings):
    """``--plugin none``: the same runner without speculation, the baseline of every comparison."""

    name: ClassVar[str] = "none"


ACCEPT_RULES = ("walk", "typical")


@dataclass(frozen=True)
class SpeculationSettings(Settings):
    """What every method that speculates has."""

    adapt: bool = setting(True, "leave out drafts that cost more time than they save, as measured while serving")
    accept: str = setting("walk", "walk: exact; typical: LOSSY, keeps drafts that are likely, not drawn")
    eps: float | None = setting(None, "typical: a token this likely is kept (0.09)", least=0.0, most=1.0)
    delta: float | None = setting(None, "typical: so is one above delta * exp(-entropy) (0.3)", least=0.0, most=1.0)

    def check(self) -> None:
        if self.accept not in ACCEPT_RULES:
            raise SettingError(
                f"{FLAG} {self.name}: accept={self.accept} is not valid; valid are {', '.join(ACCEPT_RULES)}"
            )
        for key in ("eps", "delta"):
            if self.accept != "typical" and getattr(self, key) is not None:
                raise SettingError(
                    f"{FLAG} {self.name}: {key}={getattr(self, key)} with accept={self.accept} does not go together; "
                    f"{key} belongs to accept=typical"
                )


@dataclass(frozen=True)
class LookaheadSettings(SpeculationSettings):
    """Lookahead decoding (arXiv 2402.02057) with a verification trie; ``window=0`` is prompt lookup with a trie."""

    name: ClassVar[str] = "lookahead"

    window: int = setting(
        0, "columns of the Jacobi window; 0: no window, n-grams come from the text alone", least=0, most=64
    )
    ngram: int = setting(5, "length of the window's and pools' n-grams, the known token included", least=2, most=16)
    guesses: int = setting(1, "continuations looked up per step and source, merged into one trie", least=1, most=32)
    nodes: int = setting(16, "most tree nodes for the guesses of one step", least=1, most=128)
    draft_length: int = setting(16, "longest guess from the text, at least ngram - 1", least=1, most=64)
    min_chance: float = setting(
        0.12, "a node is verified only if it is this likely to be accepted", least=0.0, most=1.0
    )
    prompt_pool: bool = setting(True, "guess from the prompt and the text generated so far")
    shared_pool: bool = setting(
        False, "one n-gram pool for all requests: their texts show in each other's drafts and timing"
    )

    def check(self) -> None:
        super().check()
        if self.window == 0 and not self.prompt_pool and not self.shared_pool:
            raise SettingError(
                f"{FLAG} {self.name}: window=0 with prompt_pool=false leaves nothing to draft from; "
                f"use window>=1, prompt_pool=true or shared_pool=true"
            )


JACOBI_MODES = ("parallel", "blocks", "hybrid")


@dataclass(frozen=True)
class JacobiSettings(SpeculationSettings):
    """Jacobi decoding (arXiv 2305.10427): the target's draws behind a wrong guess are the next guesses."""

    name: ClassVar[str] = "jacobi"

    block: int = setting(16, "tokens that are iterated on together", least=1, most=128)
    mode: str = setting(
        "parallel", "parallel: the block slides; blocks: one after the other; hybrid: blocks, then plain"
    )
    parallel_tokens: int = setting(0, "hybrid: tokens of an answer that are decoded in blocks", least=0, most=1 << 20)

    def check(self) -> None:
        super().check()
        if self.mode not in JACOBI_MODES:
            raise SettingError(
                f"{FLAG} {self.name}: mode={self.mode} is not valid; valid are {', '.join(JACOBI_MODES)}"
            )
        if (self.mode == "hybrid") != (self.parallel_tokens > 0):
            raise SettingError(
                f"{FLAG} {self.name}: mode={self.mode} with parallel_tokens={self.parallel_tokens} does not go together; "
                f"mode=hybrid needs parallel_tokens>=1, the other modes leave it out"
            )


@dataclass(frozen=True)
class MedusaSettings(SpeculationSettings):
    """Medusa heads (arXiv 2401.10774) as trees, ranked with the target's noise for sampled requests."""

    name: ClassVar[str] = "medusa"

    model: str = setting("", "folder or hub id of the heads, in the original repository's layout or vLLM's")
    nodes: int = setting(16, "most tree nodes per step", least=1, most=128)
    depth: int = setting(4, "heads in use, at most as many as the checkpoint has", least=1, most=16)
    ranks: int = setting(8, "candidates per head", least=1, most=64)
    min_chance: float = setting(
        0.03, "a node is verified only if it is this likely to be accepted", least=0.0, most=1.0
    )
    choices: str = setting("", "a fixed tree in place of the grown one: a preset, or paths of ranks as 0/0.0/1")

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """As `Settings.parse`; what `choices` decide (nodes, depth, ranks, min_chance) may be left out beside them."""
        value = given.get("choices", "")
        if value == "":
            return super().parse(given)
        try:
            paths = tree_choices.read(value)
        except ValueError as error:
            raise SettingError(f"{FLAG} {cls.name}: choices={value} {error}") from error
        name = value if isinstance(value, str) else tree_choices.text(paths)
        decided = _decided(paths)
        limits = {f.name: f.metadata["most"] for f in fields(cls)}
        for key, found in decided.items():
            if found > limits[key]:
                raise SettingError(
                    f"{FLAG} {cls.name}: choices={name} has {key}={found}; valid are at most {limits[key]}"
                )
        return super().parse({**decided, **given, "choices": name})

    @property
    def paths(self) -> tree_choices.Paths:
        """The fixed tree; empty: the tree is grown."""
        return tree_choices.read(self.choices) if self.choices else ()

    def check(self) -> None:
        super().check()
        if not self.model:
            raise SettingError(
                f"{FLAG} {self.name}: model is missing; write {self.name}:model=FOLDER_OR_HUB_ID of Medusa heads"
            )
        for key, decided in _decided(self.paths).items() if self.choices else ():
            if getattr(self, key) != decided:
                raise SettingError(
                    f"{FLAG} {self.name}: {key}={getattr(self, key)} contradicts choices={self.choices}, from which "
                    f"{key}={decided} follows; leave {key} out"
                )


def _decided(paths: tree_choices.Paths) -> dict[str, Any]:
    """What follows from a fixed tree, all of whose nodes are verified."""
    return {
        "nodes": len(paths),
        "depth": max(map(len, paths)),
        "ranks": max(map(max, paths)) + 1,
        "min_chance": 0.0,
    }


@dataclass(frozen=True)
class SpecInferSettings(SpeculationSettings):
    """Draft models (arXiv 2305.09781) as trees, ranked with the target's noise for sampled requests."""

    name: ClassVar[str] = "specinfer"

    model: str = setting("", "folder or hub id of the draft model; several with + between")
    widths: str = setting("", "children per node at each depth, as 2-2-1-1; without it the tree is grown for nodes")
    nodes: int = setting(24, "most tree nodes per step", least=1, most=128)
    depth: int = setting(6, "most levels, each a forward pass of the draft model", least=1, most=16)
    ranks: int = setting(4, "candidates per node", least=1, most=32)
    min_chance: float = setting(
        0.06, "a node is verified only if it is this likely to be accepted", least=0.0, most=1.0
    )

    def check(self) -> None:
        super().check()
        if not all(self.models):
            raise SettingError(
                f"{FLAG} {self.name}: model is missing; write {self.name}:model=FOLDER_OR_HUB_ID of a draft model"
            )
        if len(set(self.models)) < len(self.models):
            raise SettingError(f"{FLAG} {self.name}: model={self.model} names a draft model twice; give it once")
        if not self.widths:
            return
        defaults = {f.name: f.default for f in fields(self)}
        if beside := [key for key in ("nodes", "depth", "ranks", "min_chance") if getattr(self, key) != defaults[key]]:
            raise SettingError(
                f"{FLAG} {self.name}: widths={self.widths} fixes the tree, so {beside[0]}={getattr(self, beside[0])} does not "
                f"go with it; leave one of them out"
            )
        if not re.fullmatch(r"[1-9]\d?(-[1-9]\d?)*", self.widths):
            raise SettingError(
                f"{FLAG} {self.name}: widths={self.widths} is not numbers from 1 to 99 with dashes between; write 2-2-1-1"
            )
        if (nodes := self.most_nodes * len(self.models)) > 128:
            raise SettingError(
                f"{FLAG} {self.name}: widths={self.widths} makes trees of {nodes} nodes; valid are at most 128"
            )

    @property
    def models(self) -> list[str]:
        """The draft models."""
        return [model.strip() for model in self.model.split("+")]

    @property
    def most_nodes(self) -> int:
        """Nodes of one draft model's tree."""
        return sum(accumulate(self.expansion, mul)) if self.widths else self.nodes

    @property
    def expansion(self) -> list[int]:
        """`widths` as numbers; empty where the tree is grown."""
        return [int(width) for width in self.widths.split("-")] if self.widths else []


@dataclass(frozen=True)
class MixSettings(SpeculationSettings):
    """Several plugins propose, one tree is verified. ``--plugin mix:...`` beside the others sets what is the mixture's own."""

    name: ClassVar[str] = "mix"

    nodes: int = setting(0, "most nodes of the tree of all; 0: the largest of theirs", least=0, most=128)
    sources: tuple[Settings, ...] = field(
        default=(), metadata={"doc": "the plugins; each is a --plugin of its own", "least": None, "most": None}
    )

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        if "sources" in given:
            raise SettingError(
                f"{FLAG} {cls.name}: there is no setting 'sources'; give each plugin a {FLAG} of its own beside {cls.name}"
            )
        return super().parse(given)

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        del values["sources"]
        return values

    def as_given(self) -> list[dict[str, Any]]:
        return [*(source.as_dict() for source in self.sources), self.as_dict()]

    @property
    def title(self) -> str:
        return f" {FLAG} ".join(source.name for source in self.sources)
