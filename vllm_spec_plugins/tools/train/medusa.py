# SPDX-License-Identifier: Apache-2.0
"""Training of Medusa heads on a frozen model.

Cai et al., arXiv 2401.10774, section 2.2.1 (Medusa-1): head k (1 .. K) sees the hidden state that the token at t + 1 is
predicted from, and learns the token at t + k + 1; the loss is the sum over k of .8^k times the cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vllm_spec_plugins.tools.train.heads import TrainableHeads
from vllm_spec_plugins.tools.train.run import Checkpoint, Run, RunPlan, TrainError

DECAY = 0.8  # weight of a head's loss over that of the head before it


@dataclass(frozen=True)
class Plan(RunPlan):
    """A run's plan.

    Attributes:
        labels: "text": the heads learn the text; "model": the model's own distributions over it.
    """

    heads: int = 4
    layers: int = 1
    share_lm_head: bool = False
    labels: str = "text"


class FrozenModel:
    """A decoder-only model that is looked at, in float32 on a CPU and bfloat16 elsewhere.

    Attributes:
        dtype: of the checkpoint.
        lm_head: [V, H].

    Raises TrainError.
    """

    def __init__(self, model: str, device: torch.device, trust_remote_code: bool = False) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        checkpoint = Checkpoint(model, device, dtype, trust_remote_code)
        loaded, width = checkpoint.model, checkpoint.config.hidden_size
        self.dtype, self.tokenizer = checkpoint.stored, checkpoint.tokenizer
        self.model: nn.Module = loaded.requires_grad_(False)
        self.trunk: nn.Module = loaded.base_model
        head = loaded.get_output_embeddings()
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


class Training(Run[Plan]):
    """A run: only the heads are trained.

    Raises TrainError and DataError.
    """

    def __init__(self, base: FrozenModel, stream: Tensor, plan: Plan) -> None:
        if plan.length < plan.heads + 2:
            raise TrainError(
                f"--length {plan.length}: holds no example for {plan.heads} heads; use at least {plan.heads + 2}"
            )
        self.base = base
        self.heads = TrainableHeads(base.lm_head, plan.heads, plan.layers, plan.share_lm_head)
        super().__init__(self.heads, base.device, stream, plan)

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
        self.update()
        return torch.stack(losses)

    def write(self, folder: Path) -> None:
        self.heads.save(folder, self.base.dtype)

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
