# SPDX-License-Identifier: Apache-2.0
"""The methods: one line each. To add one, copy a line and write one file under proposers/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_spec_plugins.cascade.rules import Deferral
from vllm_spec_plugins.config import FLAG, Given, SettingError, Settings, parse_plugins
from vllm_spec_plugins.depth_settings import CascadeSettings, SelfDraftSettings, SkipDecodeSettings
from vllm_spec_plugins.layers.exit_policy import ExitPolicy
from vllm_spec_plugins.layers.plan import exits_of
from vllm_spec_plugins.method import SMALLEST, Method, Surroundings, Target
from vllm_spec_plugins.proposers.base import Proposer
from vllm_spec_plugins.proposers.jacobi import JacobiProposer
from vllm_spec_plugins.proposers.lookahead import LookaheadProposer
from vllm_spec_plugins.proposers.medusa import HeadShapes, MedusaHeads, MedusaProposer
from vllm_spec_plugins.proposers.mixture import MixtureProposer
from vllm_spec_plugins.proposers.self_draft import SelfDraftProposer
from vllm_spec_plugins.proposers.specinfer import SpecInferProposer
from vllm_spec_plugins.settings import (
    JacobiSettings,
    LookaheadSettings,
    MedusaSettings,
    MixSettings,
    NoneSettings,
    SpecInferSettings,
    SpeculationSettings,
)
from vllm_spec_plugins.tree.accept import AcceptRule, Typical, Walk

METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Enter a method. Refuses, at once, one that lacks what the engine will ask for."""
    settings = method.settings()  # unchecked: what must be given is missing
    name = settings.name
    if name in METHODS:
        raise ValueError(f"method {name!r} is registered already")
    nodes, depth = method.shape(settings)
    if not 0 <= depth <= nodes:
        raise ValueError(f"method {name!r} proposes {nodes} nodes down to depth {depth}")
    rule = method.rule(settings)
    if missing := [a for a in ("name", "lossless", "needs_target", "coupled", "caveat") if not hasattr(rule, a)]:
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
        choices=settings.paths,
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
    if settings.choices and settings.depth > found.heads:
        raise SettingError(
            f"{FLAG} medusa: choices={settings.choices} asks for {settings.depth} heads, {settings.model} has {found.heads}; "
            f"use choices of at most {found.heads} ranks each"
        )
    if settings.depth > found.heads:
        raise SettingError(
            f"{FLAG} medusa: depth={settings.depth} asks for more heads than the {found.heads} of {settings.model}; "
            f"use depth={found.heads} or less"
        )


def _specinfer(settings: SpecInferSettings, around: Surroundings) -> Proposer:
    def proposer(model: str) -> SpecInferProposer:
        return SpecInferProposer(
            None if around.draft is None else around.draft(model, settings.most_nodes),
            widths=settings.expansion or None,
            nodes=settings.nodes,
            depth=settings.depth,
            ranks=settings.ranks,
            min_chance=settings.min_chance,
        )

    drafts = [proposer(model) for model in settings.models]
    if len(drafts) == 1:
        return drafts[0]
    fixed = bool(settings.expansion)
    return MixtureProposer(
        drafts,
        max_requests=around.max_requests,
        device=around.device,
        nodes=settings.most_nodes * len(drafts) if fixed else settings.nodes,
        min_chance=0.0 if fixed else settings.min_chance,
    )


def _check_specinfer(settings: SpecInferSettings, target: Target) -> None:
    for model in settings.models:
        _check_draft(model, target)


def _check_draft(name: str, target: Target) -> None:
    try:
        draft = target.draft(name)
    except ValueError as error:
        raise SettingError(
            f"{FLAG} specinfer: model={name} cannot be used: {error}; give the folder or hub id of a draft model"
        ) from error
    if draft.vocab_size != target.vocab_size:
        raise SettingError(
            f"{FLAG} specinfer: model={name} has a vocabulary of {draft.vocab_size} tokens, the target one of "
            f"{target.vocab_size}; use a draft model with the target's tokenizer"
        )
    if not draft.same_tokens:
        raise SettingError(
            f"{FLAG} specinfer: the tokenizer of model={name} gives other token ids than the target's; use a draft model with "
            f"the target's tokenizer"
        )
    if draft.max_model_len < target.max_model_len:
        raise SettingError(
            f"{FLAG} specinfer: model={name} reads at most {draft.max_model_len} tokens, the engine serves up to "
            f"{target.max_model_len}; start with --max-model-len {draft.max_model_len}"
        )


def _self_draft(settings: SelfDraftSettings, around: Surroundings) -> SelfDraftProposer:
    policy = around.judge or settings.policy(around.device)
    judges = around.judge is not None
    return SelfDraftProposer(
        around.shallow and around.shallow(settings.planner(around.num_layers), policy, judges),
        nodes=settings.nodes,
        depth=settings.depth,
        ranks=settings.ranks,
        min_chance=settings.min_chance,
    )


def _check_self_draft(settings: SelfDraftSettings, target: Target) -> None:
    if target.lora:
        raise SettingError(
            f"{FLAG} {settings.name}: --enable-lora is not supported: a draft's rows have no adapters; start without it"
        )
    settings.planner(target.num_layers)
    policy = settings.policy()
    if policy is not None:
        _check_policy(policy, f"{settings.name}: exit={settings.exit}", settings, target)


def _check_policy(policy: ExitPolicy, what: str, settings: SelfDraftSettings, target: Target) -> None:
    # Asked behind the last of a part's layers; the exits before are only looked at where it compares.
    plan = settings.planner(target.num_layers).plan(np.zeros(1, dtype=np.int64))
    exits = [layer + 1 for layer in exits_of(plan, max(1, policy.exits_needed))]
    try:
        policy.check(exits, target.vocab_size, target.hidden_size)
    except ValueError as error:
        raise SettingError(f"{FLAG} {what} cannot be used: {error}") from error


def _mix(settings: MixSettings, around: Surroundings) -> MixtureProposer:
    return MixtureProposer(
        [proposer_of(source, around) for source in settings.sources],
        max_requests=around.max_requests,
        device=around.device,
        nodes=settings.nodes,
        min_chance=min((getattr(source, "min_chance", 0.0) for source in settings.sources), default=0.0),
    )


def _mixed_slots(settings: MixSettings) -> int:
    return max((method_of(source).slots(source) for source in settings.sources), default=0)


def _check_mix(settings: MixSettings, target: Target) -> None:
    for source in settings.sources:
        check = method_of(source).check
        if check is not None:
            check(source, target)


def _cascade(settings: CascadeSettings, around: Surroundings) -> Proposer:
    if settings.source is None:  # only its shape is asked for
        return MixtureProposer((), max_requests=around.max_requests)
    return proposer_of(settings.source, replace(around, judge=settings.judge(around.device)))


def _check_cascade(settings: CascadeSettings, target: Target) -> None:
    source, found = settings.source, settings.calibrated
    assert source is not None
    if (check := method_of(source).check) is not None:
        check(source, target)
    if isinstance(source, SelfDraftSettings) and (judge := settings.judge()) is not None:
        _check_policy(judge, f"{settings.name}: rule={settings.deferral()}", source, target)
    if found is not None and found.target != target.size:
        raise SettingError(
            f"{FLAG} {settings.name}: file={settings.file} was made for a model of {found.target}, and this one has "
            f"{target.size}; run vllm-spec tune cascade on this model"
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
register(
    Method(
        SpecInferSettings,
        proposer=_specinfer,
        rule=_rule,
        check=_check_specinfer,
        slots=lambda settings: settings.most_nodes,
    )
)
register(
    Method(
        SelfDraftSettings,
        proposer=_self_draft,
        rule=_rule,
        check=_check_self_draft,
        slots=lambda settings: settings.nodes,
        devices=("cpu",),
    )
)
register(Method(MixSettings, proposer=_mix, rule=_rule, check=_check_mix, slots=_mixed_slots))
register(
    Method(
        CascadeSettings,
        proposer=_cascade,
        rule=lambda settings: Deferral(settings.deferral()),
        check=_check_cascade,
        slots=lambda settings: 0 if settings.source is None else method_of(settings.source).slots(settings.source),
        devices=("cpu",),
    )
)
register(Method(SkipDecodeSettings, proposer=None, rule=lambda _: Walk(), schedule=SkipDecodeSettings.schedule))


def plugins(value: Given) -> list[Settings]:
    """The settings of each plugin that a flag, a JSON text, a mapping or a list of them names. Raises SettingError."""
    return parse_plugins(value, {name: method.settings for name, method in METHODS.items()})


def resolve(value: Given) -> Settings:
    """The settings that all of it asks for: one plugin's, those of a mixture, or of a cascade. Raises SettingError."""
    given = plugins(value)
    if any(isinstance(settings, CascadeSettings) for settings in given):
        return _cascaded(given)
    if len(given) == 1 and not isinstance(given[0], MixSettings):
        return given[0]
    return _mixture(given)


def _mixture(given: Sequence[Settings]) -> MixSettings:
    names = [settings.name for settings in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingError(f"{FLAG} {twice[0]}: is given {names.count(twice[0])} times; give it once")
    own = next((settings for settings in given if isinstance(settings, MixSettings)), MixSettings())
    sources = tuple(settings for settings in given if settings is not own)
    others = ", ".join(settings.name for settings in sources)
    if len(sources) < 2:
        raise SettingError(
            f"{FLAG} {own.name}: mixes two plugins or more, and there is {others or 'none'}; "
            f"write {FLAG} lookahead {FLAG} medusa:model=HEADS {FLAG} {own.name}:nodes=24"
        )
    for source in sources:
        method = method_of(source)
        if method.schedule is not None:
            raise SettingError(
                f"{FLAG} {source.name}: leaves out layers and proposes nothing, so it cannot be mixed ({others}); "
                f"serve it alone"
            )
        if method.proposer is None:
            raise SettingError(f"{FLAG} {source.name}: has nothing to mix with the others ({others}); leave it out")
        if not isinstance(method.rule(source), Walk):
            raise SettingError(
                f"{FLAG} {source.name}: accepts by a rule of its own, so it cannot be mixed ({others}); serve it alone"
            )
        if method.proposer(source, SMALLEST).reads_draws:
            window = f" with window={source.window}" if isinstance(source, LookaheadSettings) else ""
            raise SettingError(
                f"{FLAG} {source.name}:{window} goes on from the draws at all rows of its own tree, which a mixture cuts "
                f"and moves, so it cannot be mixed ({others}); {'use window=0' if window else 'serve it alone'}"
            )
    together = sum(method_of(source).shape(source)[0] for source in sources)
    if own.nodes > together:
        raise SettingError(
            f"{FLAG} {own.name}: nodes={own.nodes} is more than the {together} that {others} propose together; "
            f"use nodes={together} or less, or raise theirs"
        )
    every = (own, *sources)
    adapt = all(isinstance(settings, SpeculationSettings) and settings.adapt for settings in every)
    return replace(own, adapt=adapt, sources=sources)


def _cascaded(given: Sequence[Settings]) -> CascadeSettings:
    own, *twice = (settings for settings in given if isinstance(settings, CascadeSettings))
    if twice:
        raise SettingError(f"{FLAG} {own.name}: is given {len(twice) + 1} times; give it once")
    sources = [settings for settings in given if settings is not own]
    example = f"write {FLAG} self-draft:exit_layer=4 {FLAG} {own.name}:rule=difference:0.1"
    if len(sources) != 1:
        others = ", ".join(settings.name for settings in sources)
        raise SettingError(
            f"{FLAG} {own.name}: has one plugin for its cheap stage, and there is {others or 'none'}; {example}"
        )
    (source,) = sources
    method = method_of(source)
    if method.proposer is None or not getattr(method.proposer(source, SMALLEST), "tells_confidence", False):
        raise SettingError(
            f"{FLAG} {source.name}: has no model that could be the cheap stage of {FLAG} {own.name}; use self-draft, or "
            f"specinfer with one draft model"
        )
    if not isinstance(method.rule(source), Walk):
        raise SettingError(
            f"{FLAG} {source.name}: accepts by a rule of its own, and {FLAG} {own.name} has another; leave accept out"
        )
    if own.judge() is not None:
        if not isinstance(source, SelfDraftSettings):
            raise SettingError(
                f"{FLAG} {own.name}: rule={own.deferral()} asks for layers to leave, and {source.name} has none; use self-draft, "
                f"or another rule"
            )
        if source.exit:
            raise SettingError(
                f"{FLAG} {own.name}: rule={own.deferral()} judges the draft, and {source.name}:exit={source.exit} stops it; "
                f"leave one of them out"
            )
    found = own.calibrated
    if found is not None and getattr(source, "skip", "") == "auto":
        raise SettingError(
            f"{FLAG} {own.name}: file={own.file} promises nothing of {source.name}:skip=auto, which changes while serving; "
            f"give the blocks that it has found, or a rule"
        )
    if found is not None and found.plugin != stage(source):
        raise SettingError(
            f"{FLAG} {own.name}: file={own.file} was made with {found.plugin}, and the cheap stage is {stage(source)}; use that, "
            f"or make a file with this one"
        )
    assert isinstance(source, SpeculationSettings)
    return replace(own, adapt=own.adapt and source.adapt, source=source)


def stage(source: Settings) -> dict[str, Any]:
    """What of a cheap stage's settings bears on what it says."""
    return {key: value for key, value in source.as_dict().items() if key != "adapt"}


def proposer_of(settings: Settings, around: Surroundings) -> Proposer:
    """The proposer of a method that speculates."""
    make = method_of(settings).proposer
    assert make is not None
    return make(settings, around)


def method_of(settings: Settings) -> Method:
    """The method that validated settings belong to."""
    return METHODS[settings.name]
