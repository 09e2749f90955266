# SPDX-License-Identifier: Apache-2.0
"""Gates and tables for early exits, made from what a model says of text.

The model reads the text once, all layers, without gradients. Behind each exit the rest of it, final norm and LM head,
answers too; whether that answer is the whole model's is what a gate learns from the hidden state there, and what a table
counts by the token that went in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_spec_plugins.layers.exit_policy import ExitPolicy, ExitSignals
from vllm_spec_plugins.layers.recorded_exits import Gate, Hash
from vllm_spec_plugins.tools.train import data
from vllm_spec_plugins.tools.train.run import Checkpoint, TrainError
from vllm_spec_plugins.tools.train.skipdecode import decoder_layers

BOUNDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # that are tried on the held-out text, beside the one that is asked for


class ExitModel:
    """A causal language model that also answers behind some of its layers.

    Args:
        checkpoint: the model is changed in place: its layers hand on here what they return.
        exits: E numbers of layers, ascending.

    Attributes:
        vocab, num_layers: V and L.

    Raises TrainError where the decoder layers cannot be told, where an exit is none, or where the answer does not come from
    the last layer alone.
    """

    def __init__(self, checkpoint: Checkpoint, exits: Sequence[int], name: str) -> None:
        self.model, self.exits = checkpoint.model, tuple(exits)
        layers = decoder_layers(self.model, checkpoint.config.num_hidden_layers, name)
        self.num_layers, self.vocab = len(layers), int(checkpoint.config.vocab_size)
        if exits[-1] >= self.num_layers:
            raise TrainError(
                f"--exits {exits[-1]}: leaves nothing out of a model of {self.num_layers} layers; "
                f"use {self.num_layers - 1} or less"
            )
        self.device: torch.device = next(self.model.parameters()).device
        self._wanted: Sequence[int] = ()
        self._streams: dict[int, Tensor] = {}
        self._others: dict[int, tuple[Any, ...] | None] = {}  # what a layer returns beside the stream; None: no tuple
        self._ending: Tensor | None = None
        for number, layer in enumerate(layers, start=1):
            layer.forward = partial(self._layer, number, layer.forward)  # type: ignore[method-assign]
        _, answers = self._run(torch.arange(4).unsqueeze(0) % self.vocab, (self.num_layers,))
        if not torch.equal(answers[..., 0], answers[..., 1]):
            raise TrainError(
                f"--model {name}: its answer does not follow from what its last decoder layer returns, so it has none "
                f"behind the others; use a model built like Llama, Qwen, Mistral, Gemma, OPT or GPT-2"
            )

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What all layers make of `ids` [B, S].

        Returns the residual streams [B, S, E, H] behind the exits, before the final norm, and the likeliest tokens
        [B, S, E + 1] int64 there and of the whole model.
        """
        return self._run(ids, self.exits)

    @torch.no_grad()
    def _run(self, ids: Tensor, exits: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids, self._wanted = ids.to(self.device), exits
        whole, answers = self._answer(ids), []
        streams = [self._streams.pop(layer) for layer in exits]
        for stream in streams:
            self._ending = stream
            try:
                answers.append(self._answer(ids))
            finally:
                self._ending = None
        return torch.stack(streams, 2), torch.stack((*answers, whole), 2)

    def _answer(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits.argmax(-1)

    def _layer(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Layer `number`, from 1; for the answer at an exit the stream there is all that comes out of any layer."""
        if self._ending is None:
            out = forward(*args, **kwargs)
            stream, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            if number in self._wanted:
                self._streams[number] = stream
            self._others[number] = others
            return out
        others = self._others[number]
        return self._ending if others is None else (self._ending, *others)


@dataclass(eq=False)
class Recording:
    """N tokens of text at E exits, on the CPU.

    Attributes:
        exits: E layers, ascending.
        tokens: [N] int64, that went in.
        agreed: [N, E] bool, the answer at the exit is the whole model's.
        hidden: [N, E, H] in the model's dtype, the residual stream there; H is 0 unless it was asked for.
    """

    exits: tuple[int, ...]
    tokens: Tensor
    agreed: Tensor
    hidden: Tensor


def record(model: ExitModel, batches: Iterable[Tensor], keep_hidden: bool) -> Recording:
    """Let the model read windows, [B, S] at a time."""
    tokens, agreed, hidden = [], [], []
    for ids in batches:
        streams, answers = (each.flatten(0, 1) for each in model.read(ids))
        tokens.append(ids.flatten())
        agreed.append((answers[:, :-1] == answers[:, -1:]).cpu())
        hidden.append(streams.cpu() if keep_hidden else streams[..., :0].cpu())
    return Recording(model.exits, torch.cat(tokens), torch.cat(agreed), torch.cat(hidden))


def split(windows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`windows` [n, S] to learn from, and the last `share` of them, at least one, to measure on. Raises DataError."""
    if len(windows) < 2:
        raise data.DataError(
            f"--data: gives one window of {windows.shape[1]} tokens, and one is held out; give more text or --windows, or a "
            f"shorter --length"
        )
    held_out = min(max(1, round(share * len(windows))), len(windows) - 1)
    return windows[:-held_out], windows[-held_out:]


def gates(recorded: Recording, bounds: Iterable[float], penalty: float = 1e-3) -> dict[float, Gate]:
    """The same gates under each bound."""
    each = {layer: (recorded.hidden[:, e], recorded.agreed[:, e]) for e, layer in enumerate(recorded.exits)}
    gate = Gate.train(each, 0.0, penalty)
    return {bound: replace(gate, bound=bound) for bound in bounds}


def tables(recorded: Recording, bounds: Iterable[float], model: ExitModel, prior: float = 8.0) -> dict[float, Hash]:
    """A table per bound, the least share of answers behind a token that are the whole model's."""
    rows, size = (recorded.tokens, recorded.agreed, recorded.exits), (model.vocab, model.num_layers)
    return {bound: Hash.by_agreement(*rows, bound, *size, prior) for bound in bounds}


@dataclass(frozen=True)
class Figure:
    """What a policy does at an exit.

    Attributes:
        exit: layers run.
        agreement: share of all answers there that are the whole model's.
        bound: the policy's.
        good: share of answers that it calls good.
        right: share of those that are the whole model's; None without any.
    """

    exit: int
    agreement: float
    bound: float
    good: float
    right: float | None


def figures(recorded: Recording, policies: Mapping[float, ExitPolicy]) -> list[Figure]:
    """Of each exit, under each bound."""
    found = []
    for e, layer in enumerate(recorded.exits):
        agreed, none = recorded.agreed[:, e], recorded.tokens.new_empty(len(recorded.tokens), 0)
        signals = ExitSignals(layer, recorded.tokens, none.float(), recorded.hidden[:, e], none)
        for bound, policy in policies.items():
            good = policy.good(signals)
            right = agreed[good].float().mean().item() if good.any() else None
            found.append(Figure(layer, agreed.float().mean().item(), bound, good.float().mean().item(), right))
    return found
