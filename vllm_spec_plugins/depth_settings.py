# SPDX-License-Identifier: Apache-2.0
"""Settings of the plugins that decide how deep a token is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from vllm_spec_plugins.cascade.calibration import Calibrated
from vllm_spec_plugins.cascade.routes import ROUTES
from vllm_spec_plugins.cascade.rules import DeferralRule, Exit, deferral_rule
from vllm_spec_plugins.config import FLAG, SettingError, Settings, setting
from vllm_spec_plugins.layers import plan_file
from vllm_spec_plugins.layers.exits import ExitPolicy
from vllm_spec_plugins.layers.exits import policy as exit_policy
from vllm_spec_plugins.layers.plan import LayerPlan
from vllm_spec_plugins.layers.planner import FixedPlan, Planner, ScheduledPlan
from vllm_spec_plugins.layers.recorded_exits import Gate
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.layers.search import SkipSearch
from vllm_spec_plugins.layers.searched import SearchedPlan
from vllm_spec_plugins.settings import SpeculationSettings


@dataclass(frozen=True)
class SelfDraftSettings(SpeculationSettings):
    """Self-speculation: part of the target's own layers drafts, all of them verify (LayerSkip, arXiv 2404.16710; Draft &
    Verify, arXiv 2309.08168; SkipDecode's schedule, arXiv 2307.02628, made lossless).
    """

    name: ClassVar[str] = "self-draft"

    exit_layer: int | None = setting(None, "draft with this many of the first layers", least=1, most=1024)
    skip: str | None = setting(
        None, "draft without these blocks, as 3-4a-5m: all of layer 3, attention of 4, MLP of 5; or a file that vllm-spec tune "
        "wrote; or auto: found while serving, the default where exit_layer and speedup are not given"
    )  # fmt: skip
    skip_share: float | None = setting(None, "skip=auto: blocks that are skipped (0.45)", least=0.05, most=0.9)
    search_every: int | None = setting(None, "skip=auto: steps between two scores (16)", least=1, most=1 << 16)
    search_budget: float | None = setting(None, "skip=auto: scoring per work of serving (0.05)", least=0.001, most=10.0)
    speedup: float | None = setting(None, "draft by SkipDecode's schedule: layers by its average", least=1, most=16)
    max_tokens: int | None = setting(None, "speedup: tokens over which the schedule falls (256)", least=2, most=1 << 20)
    exit: str = setting("", "stop a draft where this policy finds the shallow answer not good enough, as margin:0.2")
    nodes: int = setting(16, "most tree nodes per step", least=1, most=128)
    depth: int = setting(6, "most levels, each a pass through part of the target", least=1, most=16)
    ranks: int = setting(3, "candidates per node", least=1, most=32)
    min_chance: float = setting(
        0.06, "a node is verified only if it is this likely to be accepted", least=0.0, most=1.0
    )

    def check(self) -> None:
        super().check()
        given = [key for key in ("exit_layer", "skip", "speedup") if getattr(self, key) is not None]
        if len(given) > 1:
            raise SettingError(f"{FLAG} {self.name}: {' and '.join(given)} both say what drafts; give one of them")
        if self.max_tokens is not None and self.speedup is None:
            raise SettingError(f"{FLAG} {self.name}: max_tokens={self.max_tokens} belongs to speedup; give both")
        for key in ("skip_share", "search_every", "search_budget"):
            if getattr(self, key) is not None and not self.searches:
                raise SettingError(
                    f"{FLAG} {self.name}: {key}={getattr(self, key)} belongs to skip=auto; leave {key} or the other part out"
                )
        policy = self.policy()
        if self.searches and isinstance(policy, Gate):
            raise SettingError(
                f"{FLAG} {self.name}: exit={self.exit} has gates after layers {', '.join(map(str, policy.exits))} alone, and a "
                f"part that is found while serving ends anywhere; give exit_layer={policy.exits[-1]}"
            )

    @property
    def searches(self) -> bool:
        """The skip set is found while serving."""
        return self.skip == "auto" or (self.skip is None and self.exit_layer is None and self.speedup is None)

    def policy(self, device: torch.device | str = "cpu") -> ExitPolicy | None:
        """What stops a draft early, if anything. Raises SettingError."""
        try:
            return exit_policy(self.exit, device) if self.exit else None
        except ValueError as error:
            raise SettingError(f"{FLAG} {self.name}: exit={error}") from error

    def planner(self, num_layers: int) -> Planner:
        """What drafts in a model of `num_layers`. Raises SettingError when it has not that many."""
        if self.speedup is not None:
            return ScheduledPlan(Schedule.for_speedup(num_layers, self.speedup, max_tokens=self.max_tokens or 256))
        if self.searches:
            return self._searched(num_layers)
        if self.skip is not None:
            try:
                if self.skip.endswith(".json"):
                    plan = plan_file.read(Path(self.skip), num_layers).plan
                else:
                    plan = LayerPlan.parse_skip(self.skip, num_layers)
            except ValueError as error:
                raise SettingError(f"{FLAG} {self.name}: skip={self.skip} {error}") from error
            return FixedPlan(plan)
        assert self.exit_layer is not None
        if self.exit_layer >= num_layers:
            raise SettingError(
                f"{FLAG} {self.name}: exit_layer={self.exit_layer} leaves nothing out of a model of {num_layers} layers; "
                f"use exit_layer={num_layers - 1} or less"
            )
        return FixedPlan(LayerPlan.prefix(num_layers, self.exit_layer))

    def _searched(self, num_layers: int) -> SearchedPlan:
        try:
            search = SkipSearch(num_layers, skip_share=self.skip_share or 0.45, depth=self.depth)
        except ValueError as error:
            raise SettingError(f"{FLAG} {self.name}: skip=auto cannot be used: {error}; use exit_layer") from error
        return SearchedPlan(search, budget=self.search_budget or 0.05, every=self.search_every or 16)


@dataclass(frozen=True)
class CascadeSettings(SpeculationSettings):
    """A cascade: another plugin's draft writes, the full model verifies, a rule decides whose token stands. LOSSY.

    ``--plugin cascade:...`` stands beside the plugin that is its cheap stage.
    """

    name: ClassVar[str] = "cascade"

    rule: str | None = setting(
        None, "where the draft's token stands: confidence:T, difference:A, top:A or exit:POLICY (difference:0)"
    )
    file: str | None = setting(None, "a rule that vllm-spec tune cascade has found, in place of rule")
    quality: float | None = setting(None, "refuse to start unless the file promises as much", least=0.0, most=1.0)
    route: str = setting("auto", "of requests that do not say: cheap, full (exact), or auto: cheap while it is easy")
    easy: float = setting(
        0.7, "auto: cheap while the draft's choice is the model's in so many of a request's rows", least=0.0, most=1.0
    )
    cheap_nodes: int = setting(
        16, "most nodes of other requests in a step that also serves a full one; 0: no limit", least=0, most=1 << 16
    )
    source: Settings | None = field(
        default=None, metadata={"doc": "the cheap stage; a --plugin of its own", "least": None, "most": None}
    )

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        if "source" in given:
            raise SettingError(
                f"{FLAG} {cls.name}: there is no setting 'source'; give the cheap stage a {FLAG} of its own beside {cls.name}"
            )
        return super().parse(given)

    def check(self) -> None:
        super().check()
        if self.accept != "walk":
            raise SettingError(
                f"{FLAG} {self.name}: accept={self.accept} contradicts the cascade's own rule; leave it out"
            )
        if self.route not in ROUTES:
            raise SettingError(f"{FLAG} {self.name}: route={self.route} is not valid; valid are {', '.join(ROUTES)}")
        if self.rule is not None and self.file is not None:
            raise SettingError(
                f"{FLAG} {self.name}: rule={self.rule} and file={self.file} are given; leave one of them out"
            )
        if self.file is None and self.quality is not None:
            raise SettingError(
                f"{FLAG} {self.name}: quality={self.quality:g} is promised by no file; find a rule with vllm-spec tune cascade "
                f"and give file=FILE"
            )
        self.deferral()
        found = self.calibrated
        if found is None:
            return
        if self.quality is not None and found.quality < self.quality:
            raise SettingError(
                f"{FLAG} {self.name}: quality={self.quality:g} is more than the {found.quality:g} that file={self.file} "
                f"promises; run vllm-spec tune cascade --quality {self.quality:g}"
            )
        for key, least in (("route", found.route), ("easy", found.easy)):
            if getattr(self, key) != least:
                raise SettingError(
                    f"{FLAG} {self.name}: {key}={getattr(self, key)} is not the {key}={least} that file={self.file} was made "
                    f"with; use that, or make a file with it"
                )

    @property
    def calibrated(self) -> Calibrated | None:
        """What the file holds. Raises SettingError."""
        if self.file is None:
            return None
        try:
            return Calibrated.load(self.file)
        except ValueError as error:
            raise SettingError(
                f"{FLAG} {self.name}: file={self.file} cannot be used: {error}; give one that vllm-spec tune cascade has written"
            ) from error

    def deferral(self, device: torch.device | str = "cpu") -> DeferralRule:
        """The rule. Raises SettingError."""
        found = self.calibrated
        try:
            return deferral_rule(self.rule or "difference:0" if found is None else found.rule, device)
        except ValueError as error:
            raise SettingError(f"{FLAG} {self.name}: rule={error}") from error

    def judge(self, device: torch.device | str = "cpu") -> ExitPolicy | None:
        """The exit policy that scores the cheap stage's rows, if the rule is one."""
        rule = self.deferral(device)
        return rule.policy if isinstance(rule, Exit) else None

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        values.pop("source", None)
        return values

    def as_given(self) -> list[dict[str, Any]]:
        beside = [self.source.as_dict()] if self.source is not None else []
        return [*beside, self.as_dict()]

    @property
    def title(self) -> str:
        return self.name if self.source is None else f"{self.source.name} {FLAG} {self.name}"


@dataclass(frozen=True)
class SkipDecodeSettings(Settings):
    """SkipDecode (arXiv 2307.02628): later tokens of an answer run fewer layers. LOSSY: the text is not the full model's."""

    name: ClassVar[str] = "skipdecode"

    speedup: float | None = setting(
        None, "layers of the model by the average budget; chooses max and min", least=1, most=16
    )
    max_layers: int | None = setting(None, "layers that the first generated token runs", least=1, most=1024)
    min_layers: int | None = setting(None, "layers that the last one runs", least=1, most=1024)
    warmup: int = setting(1, "layers at the bottom that always run", least=0, most=64)
    max_tokens: int = setting(256, "tokens of an answer over which the budget falls", least=2, most=1 << 20)
    levels: int = setting(4, "different budgets; 0: one for every number of layers between", least=0, most=64)
    cohort_wait: int = setting(
        0, "most steps that a new request waits so that requests of like depth share steps", least=0, most=1 << 16
    )

    def check(self) -> None:
        given = [key for key in ("max_layers", "min_layers") if getattr(self, key) is not None]
        if self.speedup is not None and given:
            raise SettingError(
                f"{FLAG} {self.name}: speedup={self.speedup:g} chooses {given[0]}, which is given too; leave one of them out"
            )
        if self.speedup is None and len(given) < 2:
            raise SettingError(
                f"{FLAG} {self.name}: neither speedup nor both of max_layers and min_layers are given; write "
                f"{self.name}:speedup=2 or {self.name}:max_layers=16,min_layers=8"
            )
        if given and not self.warmup <= self.min_layers <= self.max_layers:  # type: ignore[operator]
            raise SettingError(
                f"{FLAG} {self.name}: warmup={self.warmup}, min_layers={self.min_layers}, max_layers={self.max_layers} do not "
                f"go together; valid is warmup <= min_layers <= max_layers"
            )
        if self.levels == 1:
            raise SettingError(f"{FLAG} {self.name}: levels=1 is no schedule; use levels=0 or 2 to 64")
        if self.levels > self.max_tokens:
            raise SettingError(
                f"{FLAG} {self.name}: levels={self.levels} are more than the {self.max_tokens} places of max_tokens; "
                f"use levels={self.max_tokens} or less"
            )

    def schedule(self, num_layers: int) -> Schedule:
        """The schedule for a model. Raises SettingError when the model has too few layers."""
        others = {"warmup": self.warmup, "max_tokens": self.max_tokens, "levels": self.levels}
        most = max(self.warmup, self.max_layers or 0)
        if most > num_layers:
            key = "warmup" if self.warmup == most else "max_layers"
            raise SettingError(
                f"{FLAG} {self.name}: {key}={most} is more than the {num_layers} layers of the model; "
                f"use {key}={num_layers} or less"
            )
        if self.speedup is not None:
            return Schedule.for_speedup(num_layers, self.speedup, **others)
        assert self.max_layers is not None and self.min_layers is not None
        return Schedule(num_layers, self.max_layers, self.min_layers, **others)
