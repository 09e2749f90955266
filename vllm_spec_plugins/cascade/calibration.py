# SPDX-License-Identifier: Apache-2.0
"""The boldest deferral rule that keeps a promise, and the file that carries it from `vllm-spec tune cascade` to a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_spec_plugins.cascade.rules import DeferralRule, deferral_rule
from vllm_spec_plugins.layers.calibration import PValue, boldest, hoeffding_bentkus


@dataclass(frozen=True)
class Calibrated:
    """A rule and what was shown of it.

    Attributes:
        rule: as in a setting, with the bound that was found.
        quality, error: with a chance of at least 1 - error over the draw of the prompts, the expected share of a text's tokens
            that are the full model's choice at their place is at least `quality`.
        prompts, tokens: that it rests on, and how long the answers were at most.
        loss: mean share of the calibration prompts' tokens that are not the full model's choice.
        plugin: the settings of the cheap stage.
        target: hidden_size, vocab_size and num_layers of the full model.
        route, easy: of the requests.
    """

    rule: str
    quality: float
    error: float
    prompts: int
    tokens: int
    loss: float
    plugin: dict[str, Any]
    target: dict[str, int]
    route: str
    easy: float

    def save(self, file: Path, **others: Any) -> None:
        """As JSON; `others` is for readers."""
        file.write_text(json.dumps({**asdict(self), **others}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str) -> Calibrated:
        """Raises ValueError with what is wrong with the file."""
        return cls._parse(_read(file))

    @classmethod
    def _parse(cls, text: str) -> Calibrated:
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from error
        kinds = {
            "rule": str, "quality": float, "error": float, "prompts": int, "tokens": int, "loss": float, "plugin": dict,
            "target": dict, "route": str, "easy": float,
        }  # fmt: skip
        assert kinds.keys() == {f.name for f in fields(cls)}
        if not isinstance(given, dict):
            raise ValueError("it holds no object")
        for key, kind in kinds.items():
            if type(given.get(key)) is not kind:
                raise ValueError(f"its {key!r} is {given.get(key)!r:.80}, not {kind.__name__}")
        deferral_rule(given["rule"])
        return cls(**{key: given[key] for key in kinds})


@lru_cache(maxsize=8)
def _read(file: str) -> str:
    """Once per process: a running engine's rule does not change under it."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({error})") from error


def calibrate(
    losses: Mapping[float, Sequence[float]],
    rule: DeferralRule,
    quality: float,
    error: float,
    p_value: PValue = hoeffding_bentkus,
) -> DeferralRule | None:
    """The boldest bound that may be taken to lose at most 1 - quality; None where not even the safest may.

    Args:
        losses: by bound, each prompt's share of tokens that are not the full model's choice; the same prompts everywhere.
    """
    bounds = sorted(losses, key=lambda bound: -rule.at(bound).threshold)  # safest first
    table = np.array([losses[bound] for bound in bounds], dtype=np.float64).T
    column = boldest(table, 1.0 - quality, error, p_value)
    return None if column is None else rule.at(bounds[column])
