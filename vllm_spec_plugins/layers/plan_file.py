# SPDX-License-Identifier: Apache-2.0
"""A skip set as a file: written once by ``vllm-spec tune``, read at every start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spec_plugins.layers.plan import LayerPlan


@dataclass(frozen=True)
class PlanFile:
    """A plan, and how it was found.

    Attributes:
        model: that it was found for, as it was named.
        plan: the blocks that run.
        agreement: of its greedy guesses with the model's text.
        prompts: whose answers were that text.
    """

    model: str
    plan: LayerPlan
    agreement: float
    prompts: int

    def write(self, path: Path) -> None:
        """Write the file."""
        runs = {"attention": self.plan.attention, "mlp": self.plan.mlp}
        content = {
            "model": self.model,
            "num_layers": self.plan.num_layers,
            **{block: [i for i, flag in enumerate(flags) if not flag] for block, flags in runs.items()},
            "agreement": round(self.agreement, 4),
            "share": round(self.plan.share, 4),
            "prompts": self.prompts,
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def read(path: Path, num_layers: int) -> PlanFile:
    """The file's plan for a model of `num_layers`. Raises ValueError, whose message goes on from the file's name."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); make it with vllm-spec tune self-draft") from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError("is not JSON; make it with vllm-spec tune self-draft") from error
    if not _is_plan(content):
        raise ValueError("does not list the attention and mlp blocks to skip; make it with vllm-spec tune self-draft")
    if content["num_layers"] != num_layers:
        raise ValueError(
            f"is for a model of {content['num_layers']} layers ({content['model']}); this one has {num_layers}"
        )
    plan = LayerPlan.skipping(num_layers, content["attention"], content["mlp"])
    return PlanFile(content["model"], plan, float(content["agreement"]), int(content["prompts"]))


def _is_plan(content: Any) -> bool:
    kinds: dict[str, Any] = {
        "model": str,
        "num_layers": int,
        "agreement": float | int,
        "prompts": int,
        "attention": list,
        "mlp": list,
    }
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(type(layer) is int for layer in (*content["attention"], *content["mlp"]))
