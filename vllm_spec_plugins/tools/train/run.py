# SPDX-License-Identifier: Apache-2.0
"""What every training run has: a model to start from, windows of text, an optimizer, and a state to go on from."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vllm_spec_plugins.tools.train.data import Windows


class TrainError(ValueError):
    """A run that cannot be done; the message is the sentence a user reads."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Checkpoint:
    """A decoder-only model of transformers and its tokenizer.

    Attributes:
        model: on `device`, its weights in `dtype`; without dropout, so that a run can be repeated.
        stored: the dtype of the checkpoint.

    Raises TrainError.
    """

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        own = {"trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(model, **own)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, **own)
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **own)
        except (OSError, ImportError, KeyError, ValueError) as error:
            raise TrainError(f"--model {model}: cannot be loaded ({first_line(error)})") from error
        if config.is_encoder_decoder:
            raise TrainError(f"--model {model}: is an encoder-decoder model; use a decoder-only one")
        self.stored: torch.dtype = config.get_text_config().dtype or torch.float32
        self.model: Any = loaded.to(device).eval()
        self.config: Any = config.get_text_config()


@dataclass(frozen=True)
class RunPlan:
    """What decides a run's outcome, and must stay the same when it goes on.

    Attributes:
        model: folder or hub id of the model.
        tokens: to train on in all; more than the text has are further passes over it, 0 is one pass.
        batch, length: windows per step, tokens per window.
        rate, warmup: AdamW's highest learning rate, and the share of the run in which it is reached.
    """

    model: str
    tokens: int = 0
    batch: int = 8
    length: int = 512
    rate: float = 1e-3
    warmup: float = 0.05
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)


P = TypeVar("P", bound=RunPlan)


class Run(ABC, Generic[P]):
    """A run. It can be left after any step and goes on to the same bits on a CPU.

    Args:
        weights: the module that is trained.
        stream: [n] int64, the text.

    Raises TrainError and DataError.
    """

    def __init__(self, weights: nn.Module, device: torch.device, stream: Tensor, plan: P) -> None:
        self.windows = Windows(stream, plan.length, plan.seed)
        plan = replace(plan, tokens=plan.tokens or self.windows.train.numel())
        if plan.steps < 1:
            raise TrainError(
                f"--batch {plan.batch} windows of --length {plan.length} are {plan.batch * plan.length} tokens a step, "
                f"the run has {plan.tokens}; give more text or --tokens, or a smaller --batch or --length"
            )
        self.weights, self.device, self.plan, self.step = weights, device, plan, 0
        self.text = hashlib.sha256(stream.numpy().tobytes()).hexdigest()
        self.learned = [weight for weight in weights.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(self) -> float:
        """Of the next step: rises in a straight line, falls along a cosine to zero."""
        warmup = max(1, round(self.plan.warmup * self.plan.steps))
        if self.step < warmup:
            return self.plan.rate * (self.step + 1) / warmup
        return self.plan.rate * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.plan.steps - warmup)))

    @abstractmethod
    def advance(self) -> Tensor:
        """One step; its losses [k], in nats."""

    def update(self) -> None:
        """End a step: the optimizer takes the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @abstractmethod
    def write(self, folder: Path) -> None:
        """The result, whole or not at all."""

    def save(self, file: Path) -> None:
        """Everything that going on takes, whole or not at all."""
        state = {
            "plan": asdict(self.plan),
            "text": self.text,
            "step": self.step,
            "weights": self.weights.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = file.with_name(f"{file.name}.tmp")
        torch.save(state, unfinished)
        unfinished.replace(file)

    def load(self, file: Path) -> None:
        """Go on from `file`. Raises TrainError where it is of another run."""
        try:
            state: dict[str, Any] = torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:  # whatever a damaged file makes of the unpickler
            raise TrainError(f"--resume: {file} cannot be read ({first_line(error)}); start again elsewhere") from error
        for key, value in asdict(self.plan).items():
            if state["plan"].get(key) != value:
                raise TrainError(
                    f"--resume: {file} is of a run with {key}={state['plan'].get(key)}, this one has {key}={value}; "
                    f"give the settings that it began with"
                )
        if state["text"] != self.text:
            raise TrainError(f"--resume: {file} is of a run on another text; give the --data that it began with")
        self.weights.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
