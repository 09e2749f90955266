# SPDX-License-Identifier: Apache-2.0
"""Training of Medusa heads on a frozen model.

Cai et al., arXiv 2401.10774, section 2.2.1 (Medusa-1): head k (1 .. K) sees the hidden state that the token at t + 1 is
predicted from, and learns the token at t + k + 1; the loss is the sum over k of .8^k times the cross entropy.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vllm_spec_plugins.tools.train.data import Windows
from vllm_spec_plugins.tools.train.heads import TrainableHeads

DECAY = 0.8  # weight of a head's loss over that of the head before it


class TrainError(ValueError):
    """A run that cannot be done; the message is the sentence a user reads."""


@dataclass(frozen=True)
class Plan:
    """What decides a run's outcome, and must stay the same when it goes on.

    Attributes:
        model: folder or hub id of the frozen model.
        labels: "text": the heads learn the text; "model": the model's own distributions over it.
        tokens: to train on in all; more than the text has are further passes over it, 0 is one pass.
        batch, length: windows per step, tokens per window.
        rate, warmup: AdamW's highest learning rate, and the share of the run in which it is reached.
    """

    model: str
    heads: int = 4
    layers: int = 1
    share_lm_head: bool = False
    labels: str = "text"
    tokens: int = 0
    batch: int = 8
    length: int = 512
    rate: float = 1e-3
    warmup: float = 0.05
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)


class FrozenModel:
    """A decoder-only model that is looked at, in float32 on a CPU and bfloat16 elsewhere.

    Attributes:
        dtype: of the checkpoint.
        lm_head: [V, H].

    Raises TrainError.
    """

    def __init__(self, model: str, device: torch.device, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        own = {"trust_remote_code": trust_remote_code}
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        try:
            config = AutoConfig.from_pretrained(model, **own)
            self.dtype: torch.dtype = config.get_text_config().dtype or torch.float32
            self.tokenizer = AutoTokenizer.from_pretrained(model, **own)
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **own)
        except (OSError, ImportError, KeyError, ValueError) as error:
            raise TrainError(f"--model {model}: cannot be loaded ({_first_line(error)})") from error
        if config.is_encoder_decoder:
            raise TrainError(f"--model {model}: is an encoder-decoder model; use a decoder-only one")
        self.model: nn.Module = loaded.to(device).eval().requires_grad_(False)
        self.trunk: nn.Module = loaded.base_model
        head, width = loaded.get_output_embeddings(), config.get_text_config().hidden_size
        if self.trunk is loaded or head is None or head.weight.dim() != 2 or head.weight.shape[1] != width:
            raise TrainError(
                f"--model {model}: its LM head is no matrix from its last hidden state; heads cannot start as it"
            )
        self.lm_head: Tensor = head.weight
        self.device = device

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """[B, S, H]: what the LM head sees, behind the final norm."""
        return self.trunk(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def hidden_and_logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H] and [B, S, V]."""
        kept: list[Tensor] = []
        hook = self.trunk.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return kept[0], logits


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Training:
    """A run. It can be left after any step and goes on to the same bits on a CPU.

    Args:
        base: the frozen model.
        stream: [n] int64, the text.

    Raises TrainError and DataError.
    """

    def __init__(self, base: FrozenModel, stream: Tensor, plan: Plan) -> None:
        if plan.length < plan.heads + 2:
            raise TrainError(
                f"--length {plan.length}: holds no example for {plan.heads} heads; use at least {plan.heads + 2}"
            )
        self.windows = Windows(stream, plan.length, plan.seed)
        plan = replace(plan, tokens=plan.tokens or self.windows.train.numel())
        if plan.steps < 1:
            raise TrainError(
                f"--batch {plan.batch} windows of --length {plan.length} are {plan.batch * plan.length} tokens a step, "
                f"the run has {plan.tokens}; give more text or --tokens, or a smaller --batch or --length"
            )
        self.base, self.plan, self.step = base, plan, 0
        self.text = hashlib.sha256(stream.numpy().tobytes()).hexdigest()
        self.heads = TrainableHeads(base.lm_head, plan.heads, plan.layers, plan.share_lm_head)
        learned = [weight for weight in self.heads.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(self) -> float:
        """Of the next step: rises in a straight line, falls along a cosine to zero."""
        warmup = max(1, round(self.plan.warmup * self.plan.steps))
        if self.step < warmup:
            return self.plan.rate * (self.step + 1) / warmup
        return self.plan.rate * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.plan.steps - warmup)))

    def advance(self) -> Tensor:
        """One step; the heads' mean losses [K], in nats."""
        ids = self.windows.batch(self.step, self.plan.batch).to(self.base.device)
        logits = None
        if self.plan.labels == "model":
            hidden, logits = self.base.hidden_and_logits(ids)
        else:
            hidden = self.base.hidden(ids)
        count = self.plan.length - self.plan.heads - 1  # places with a label for every head
        seen = hidden[:, :count].flatten(0, 1)
        losses = []
        # Head by head: the logits of one are what takes the memory.
        for k in range(1, self.plan.heads + 1):
            if logits is None:
                labels = ids[:, k + 1 : k + 1 + count].flatten()
            else:
                labels = logits[:, k : k + count].flatten(0, 1).float().softmax(-1)
            loss = cross_entropy(self._logits(seen, k - 1), labels)
            (DECAY**k * loss).backward()
            losses.append(loss.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.stack(losses)

    def _logits(self, hidden: Tensor, head: int) -> Tensor:
        device = self.base.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            return self.heads(hidden if device != "cpu" else hidden.float(), head).float()

    @torch.no_grad()
    def agreement(self) -> list[float]:
        """Per head, how often its first guess is the model's own at that place, on the held-out windows."""
        count = self.plan.length - self.plan.heads - 1
        hits = torch.zeros(self.plan.heads)
        for ids in self.windows.held_out.split(self.plan.batch):
            hidden, logits = self.base.hidden_and_logits(ids.to(self.base.device))
            best = logits.argmax(-1)
            seen = hidden[:, :count].flatten(0, 1)
            for k in range(1, self.plan.heads + 1):
                hits[k - 1] += (self._logits(seen, k - 1).argmax(-1) == best[:, k : k + count].flatten()).sum().cpu()
        return (hits / (len(self.windows.held_out) * count)).tolist()

    def save(self, file: Path) -> None:
        """Everything that going on takes, whole or not at all."""
        state = {
            "plan": asdict(self.plan),
            "text": self.text,
            "step": self.step,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = file.with_name(f"{file.name}.tmp")
        torch.save(state, unfinished)
        unfinished.replace(file)

    def load(self, file: Path) -> None:
        """Go on from `file`. Raises TrainError where it is of another run."""
        try:
            state: dict[str, Any] = torch.load(file, map_location=self.base.device, weights_only=True)
        except Exception as error:  # whatever a damaged file makes of the unpickler
            raise TrainError(
                f"--resume: {file} cannot be read ({_first_line(error)}); start again elsewhere"
            ) from error
        for key, value in asdict(self.plan).items():
            if state["plan"][key] != value:
                raise TrainError(
                    f"--resume: {file} is of a run with {key}={state['plan'][key]}, this one has {key}={value}; "
                    f"give the settings that it began with"
                )
        if state["text"] != self.text:
            raise TrainError(f"--resume: {file} is of a run on another text; give the --data that it began with")
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
