# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a model for SkipDecode's schedule, and its loss under one.

Del Corro et al., arXiv 2307.02628, sections 3 and 4: an untuned model has never seen its layers skipped; SkipDecode's is
fine-tuned with the budgets that it is served with.

Teacher forcing, all places of a window in one pass. The window's first P tokens are the prompt, which runs all layers; the row
at P + i runs `Schedule.budget(i)` of them. Budgets never grow, so the rows that run a layer are the first ones of the window
and every row reads the K/V of exactly those before it, all of which ran the layer: cutting a layer's input off behind its
last row is the schedule, not an approximation of it.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools.train.run import Checkpoint, Run, RunPlan, TrainError

LARGEST_NORM = 1.0  # of a step's gradients
SCHEDULE = "skipdecode.json"
# Where the window's places lie in what a decoder layer is given.
PLACES: dict[str, tuple[int, ...]] = {
    "hidden_states": (1,),
    "attention_mask": (-2, -1),
    "position_ids": (-1,),
    "cache_position": (-1,),
    "position_embeddings": (-2,),  # cosines and sines
}


def rows_of_layers(schedule: Schedule, prompt: int, rows: int) -> list[int]:
    """L numbers: how many of a window's `rows`, whose first `prompt` are the prompt's, run each layer."""
    budgets = schedule.of_places(np.arange(rows) - prompt)
    assert (np.diff(budgets) <= 0).all(), "a row would read K/V that no layer wrote"
    return [int((budgets >= schedule.needs(layer)).sum()) for layer in range(schedule.num_layers)]


class ScheduledModel:
    """A causal language model whose rows run the layers that a schedule gives them.

    Args:
        checkpoint: the model is changed in place: each of its layers asks here for its rows.

    Attributes:
        num_layers: L.

    Raises TrainError where the decoder layers cannot be told.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.model, self.name = checkpoint, checkpoint.model, name
        self.layers = decoder_layers(self.model, checkpoint.config.num_hidden_layers, name)
        self.num_layers = len(self.layers)
        self.device: torch.device = next(self.model.parameters()).device
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._rows: Sequence[int] | None = None
        for index, layer in enumerate(self.layers):
            signature = inspect.signature(layer.forward)
            layer.forward = partial(self._layer, index, layer.forward, signature)  # type: ignore[method-assign]
        # Whatever the layers take that rows cannot be cut off from shows here, not after the text is read.
        with torch.no_grad():
            self._run(torch.zeros(1, 2, dtype=torch.int64, device=self.device), [1] * self.num_layers, 1)

    def loss(self, ids: Tensor, schedule: Schedule | None, prompt: int, answer_only: bool = True) -> Tensor:
        """Mean cross entropy in nats of the tokens of `ids` [B, S] that the rows behind the prompt predict.

        Args:
            schedule: None: all rows run all layers.
            prompt: P, 1 <= P <= S - 2; row P is the first generated token's and predicts the second.
            answer_only: False: of all tokens but the first.
        """
        given = ids[:, :-1].to(self.device)
        rows = given.shape[1]
        assert 1 <= prompt < rows, f"a prompt of {prompt} tokens leaves no answer in {rows} rows"
        first = prompt if answer_only else 0
        logits = self.logits(given, schedule, prompt, rows - first)
        return cross_entropy(logits.flatten(0, 1), ids[:, first + 1 :].flatten().to(self.device))

    def logits(self, ids: Tensor, schedule: Schedule | None, prompt: int, last: int) -> Tensor:
        """[B, last, V] float32: those of the last rows of `ids` [B, R]."""
        return self._run(ids, rows_of_layers(schedule, prompt, ids.shape[1]) if schedule else None, last)

    def _run(self, ids: Tensor, rows: Sequence[int] | None, last: int) -> Tensor:
        """As `logits`, with the rows of each layer; None: all."""
        self._rows = rows
        kind = self.device.type
        keep = {"logits_to_keep": last} if self._keeps else {}
        try:
            with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
                logits = self.model(input_ids=ids, use_cache=False, **keep).logits
        finally:
            self._rows = None
        return logits[:, -last:].float()

    def _layer(self, index: int, forward: Callable[..., Any], signature: inspect.Signature, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        """Layer `index` on its rows; the others pass by it."""
        if self._rows is None or (count := self._rows[index]) == _hidden(args, kwargs).shape[1]:
            return forward(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        hidden = bound.arguments["hidden_states"]
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._cut(key, item, count) for key, item in value.items()}
            else:
                bound.arguments[name] = self._cut(name, value, count)
        out = forward(*bound.args, **bound.kwargs)
        ran = out[0] if isinstance(out, tuple) else out
        joined = torch.cat((ran, hidden[:, count:]), 1)
        return (joined, *out[1:]) if isinstance(out, tuple) else joined

    def _cut(self, name: str, value: Any, count: int) -> Any:
        """The first `count` places of what a layer is given as `name`."""
        if isinstance(value, tuple):
            return tuple(self._cut(name, item, count) for item in value)
        if not isinstance(value, Tensor):
            return value
        if name not in PLACES:
            raise TrainError(f"--model {self.name}: its layers take {name}, of which it is not known how to skip rows")
        for dim in PLACES[name]:
            value = value.narrow(dim, 0, count)
        return value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def decoder_layers(model: Any, count: int, name: str) -> nn.ModuleList:
    """The list of the model's `count` layers. Raises TrainError where there is none, or more than one."""
    trunk: nn.Module = model.base_model
    lists = {path: module for path, module in trunk.named_modules() if isinstance(module, nn.ModuleList)}
    # A list inside a layer (of experts, say) is none of layers.
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    found = [lists[path] for path in outer if len(lists[path]) == count]
    if len(found) != 1 or any("hidden_states" not in inspect.signature(layer.forward).parameters for layer in found[0]):
        raise TrainError(
            f"--model {name}: is a {type(model).__name__}, in which no one list holds the {count} decoder layers; "
            f"use a model built like Llama, Qwen, Mistral, Gemma, OPT or GPT-2"
        )
    return found[0]


@dataclass(frozen=True, kw_only=True)
class SkipDecodePlan(RunPlan):
    """A run's plan.

    Attributes:
        schedule: what the model is trained for.
        prompt: least and most tokens of a window's prompt, at most length - 2; each step draws its own.
        loss: "answer": of the tokens that scheduled rows predict; "all": of the prompt's too.
        anneal: share of the run in which the budgets fall from all layers to the schedule's.
    """

    schedule: Schedule
    prompt: tuple[int, int] = (32, 128)
    loss: str = "answer"
    anneal: float = 0.0
    rate: float = 1e-4


class SkipDecodeTraining(Run[SkipDecodePlan]):
    """A run: all weights of the model are trained, in float32.

    Raises TrainError and DataError.
    """

    def __init__(self, base: ScheduledModel, stream: Tensor, plan: SkipDecodePlan) -> None:
        self.base = base
        super().__init__(base.model, base.device, stream, plan)

    def prompt(self) -> int:
        """Of the next step's windows, from the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
        least, most = self.plan.prompt
        return int(torch.randint(least, most + 1, (), generator=generator))

    def schedule(self) -> Schedule:
        """Of the next step."""
        aim, steps = self.plan.schedule, self.plan.anneal * self.plan.steps
        if self.step + 1 >= steps:
            return aim
        done, full = (self.step + 1) / steps, aim.num_layers
        return replace(
            aim,
            max_layers=round(full - done * (full - aim.max_layers)),
            min_layers=round(full - done * (full - aim.min_layers)),
        )

    def advance(self) -> Tensor:
        ids = self.windows.batch(self.step, self.plan.batch)
        loss = self.base.loss(ids, self.schedule(), self.prompt(), self.plan.loss == "answer")
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, LARGEST_NORM)
        self.update()
        return loss.detach()[None]

    def held_out(self) -> tuple[float, float]:
        """Losses of the held-out windows' answers: of all layers, and under the schedule. The prompt is of middling length."""
        prompt = sum(self.plan.prompt) // 2
        windows, batch = self.windows.held_out, self.plan.batch
        return (
            mean_loss(self.base, windows, None, prompt, batch),
            mean_loss(self.base, windows, self.plan.schedule, prompt, batch),
        )

    def write(self, folder: Path) -> None:
        """A checkpoint like the one that was loaded, in its dtype, and the schedule beside it. The weights in memory are
        rounded as the written ones are."""
        checkpoint, part = self.base.checkpoint, folder / "unfinished"
        self._store(checkpoint.stored)
        self.base.model.save_pretrained(part)
        checkpoint.tokenizer.save_pretrained(part)
        (part / SCHEDULE).write_text(json.dumps(asdict(self.plan.schedule), indent=2) + "\n")
        for file in part.iterdir():
            if file.is_file():
                file.chmod(0o644)  # safetensors makes its files private to their owner
            file.replace(folder / file.name)
        shutil.rmtree(part)
        self._store(torch.float32)

    def _store(self, dtype: torch.dtype) -> None:
        """Not `model.to`, which would round buffers, the rotary frequencies among them."""
        for weight in self.learned:
            weight.data = weight.data.to(dtype)


@torch.no_grad()
def mean_loss(model: ScheduledModel, windows: Tensor, schedule: Schedule | None, prompt: int, batch: int) -> float:
    """`ScheduledModel.loss` over all `windows` [n, S], `batch` at a time."""
    total = 0.0
    for ids in windows.split(batch):
        total += model.loss(ids, schedule, prompt).item() * len(ids)
    return total / len(windows)
