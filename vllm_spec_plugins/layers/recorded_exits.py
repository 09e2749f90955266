# SPDX-License-Identifier: Apache-2.0
"""Early-exit policies that are made from recorded text, for one model: a table of tokens, a learned gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, rms_norm

from vllm_spec_plugins.layers.exit_policy import ExitPolicy, ExitSignals


@dataclass(eq=False)
class Hash(ExitPolicy):
    """A fixed exit per token id: HashEE (Sun et al., arXiv 2203.01670). Known before the pass from the token that goes in.

    The score is the layers run beyond the token's own exit.

    Attributes:
        layers: [V] int16, the layers after which each token's answer is good.
        file: where they come from.
    """

    name, example = "hash", "hash:FILE"

    layers: Tensor
    file: str = ""

    @property
    def exits_needed(self) -> int:
        return 0

    def score(self, signals: ExitSignals) -> Tensor:
        return (signals.layer - self.layers[signals.tokens]).float()

    def check(self, exits: Sequence[int], vocab: int, hidden: int) -> None:
        super().check(exits, vocab, hidden)
        if len(self.layers) != vocab:
            raise ValueError(
                f"{self} has exits for {len(self.layers)} tokens, and the model has {vocab}; build it for this model"
            )

    @classmethod
    def by_frequency(
        cls, tokens: Tensor, exits: Sequence[int], shares: Sequence[float], vocab: int, num_layers: int
    ) -> Hash:
        """The most frequent tokens leave first.

        Args:
            tokens: [n] int64, recorded text.
            exits: layers, ascending.
            shares: of the text, that leave at each exit; what is left of 1, and tokens that the text lacks, run all layers.
            vocab, num_layers: V and L of the model.
        """
        counts = torch.bincount(tokens, minlength=vocab)
        order = counts.argsort(descending=True, stable=True)
        before = counts[order].cumsum(0) - counts[order]  # tokens of the text that are more frequent
        bounds = torch.tensor(shares, dtype=torch.float64).cumsum(0) * len(tokens)
        rank = torch.bucketize(before.double(), bounds, right=True)
        layers = torch.empty(vocab, dtype=torch.int16)
        layers[order] = torch.tensor([*exits, num_layers], dtype=torch.int16)[rank]
        layers[counts == 0] = num_layers
        return cls(0.0, layers)

    @classmethod
    def by_agreement(
        cls,
        tokens: Tensor,
        agreed: Tensor,
        exits: Sequence[int],
        least: float,
        vocab: int,
        num_layers: int,
        prior: float = 8.0,
    ) -> Hash:
        """A token leaves at the first exit whose answers behind it were the full model's in a share of at least `least`.

        Args:
            tokens: [n] int64, recorded text.
            agreed: [n, E] bool, at each exit.
            exits: E layers, ascending.
            vocab, num_layers: V and L of the model; a token with no such exit runs all L layers.
            prior: a token's share counts for as much as so many of its places at the exit's share over all tokens.
        """
        counts = torch.bincount(tokens, minlength=vocab).double().unsqueeze(1)
        hits = torch.zeros(vocab, len(exits), dtype=torch.float64).index_add_(0, tokens, agreed.double())
        share = (hits + prior * agreed.double().mean(0)) / (counts + prior)
        # One column more: the full model agrees with itself.
        enough = torch.cat((share >= least, torch.ones(vocab, 1, dtype=torch.bool)), 1)
        return cls(0.0, torch.tensor([*exits, num_layers], dtype=torch.int16)[enough.int().argmax(1)])

    def save(self, file: Path) -> None:
        """One tensor, `layers`, in safetensors' format."""
        save_file({"layers": self.layers.cpu()}, file)

    @classmethod
    def parse(cls, text: str, device: torch.device | str) -> Self:
        file = text.partition(":")[2]
        tensors = _load(cls, text, file, {"layers": 1}, device)
        if not bool((tensors["layers"] >= 1).all()):
            raise ValueError(f"{text} sends tokens out before the first layer; every exit must be 1 or more")
        return cls(0.0, tensors["layers"].to(torch.int16), file)

    def __str__(self) -> str:
        return f"{self.name}:{self.file}"


@dataclass(eq=False)
class Gate(ExitPolicy):
    """A learned linear gate on the hidden state gives agreement with the full model a chance of at least `bound`.

    One logistic unit per exit, on the hidden state at unit root mean square. After the gates of SkipLayer (Zeng et al., arXiv
    2311.15436) and CATs' meta classifier (Schuster et al., arXiv 2104.08803), which predicts whether the answer is consistent.

    Attributes:
        exits: E layers behind which there is a gate.
        weight: [E, H] float32.
        bias: [E] float32.
        file: where they come from.
    """

    name, example = "gate", "gate:FILE:0.8"

    exits: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    file: str = ""

    def score(self, signals: ExitSignals) -> Tensor:
        """Raises ValueError where there is no gate."""
        if signals.layer not in self.exits:
            raise ValueError(self._missing(signals.layer))
        gate = self.exits.index(signals.layer)
        return torch.sigmoid(_unit(signals.hidden) @ self.weight[gate] + self.bias[gate])

    def check(self, exits: Sequence[int], vocab: int, hidden: int) -> None:
        super().check(exits, vocab, hidden)
        if self.weight.shape[1] != hidden:
            raise ValueError(
                f"{self} reads {self.weight.shape[1]} hidden channels, and the model has {hidden}; train it on this model"
            )
        for layer in exits:
            if layer not in self.exits:
                raise ValueError(self._missing(layer))

    def _missing(self, layer: int) -> str:
        return f"{self} has no gate after layer {layer}; it has them after {', '.join(map(str, self.exits))}"

    @classmethod
    def train(
        cls, recorded: Mapping[int, tuple[Tensor, Tensor]], bound: float, penalty: float = 1e-3, iterations: int = 200
    ) -> Gate:
        """Logistic regression, always to the same weights.

        Args:
            recorded: per exit layer hidden states [n, H] and whether the answer was the full model's, [n] bool.
            bound: as above.
            penalty: times half the squared length of the weights, added to the mean loss.
            iterations: at most so many of L-BFGS.
        """
        gates = []
        for hidden, agreed in recorded.values():
            x, y = _unit(hidden).double(), agreed.double()
            gate = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
            solver = torch.optim.LBFGS([gate], max_iter=iterations, line_search_fn="strong_wolfe")

            def loss(x: Tensor = x, y: Tensor = y, gate: Tensor = gate) -> Tensor:
                gate.grad = None
                fit = binary_cross_entropy_with_logits(x @ gate[:-1] + gate[-1], y)
                total = fit + penalty / 2 * gate[:-1].square().sum()
                total.backward()
                return total

            with torch.enable_grad():
                solver.step(loss)
            gates.append(gate.detach().float())
        weight, bias = torch.stack(gates).split((len(gates[0]) - 1, 1), dim=1)
        return cls(bound, tuple(recorded), weight.contiguous(), bias.squeeze(1).contiguous())

    def save(self, file: Path) -> None:
        """Tensors `exits` [E], `weight` [E, H] and `bias` [E] in safetensors' format."""
        tensors = {"weight": self.weight.cpu(), "bias": self.bias.cpu(), "exits": torch.tensor(self.exits)}
        save_file(tensors, file)

    @classmethod
    def parse(cls, text: str, device: torch.device | str) -> Self:
        file, _, number = text.partition(":")[2].rpartition(":")
        bound = cls._bound(text, number)
        tensors = _load(cls, text, file, {"exits": 1, "weight": 2, "bias": 1}, device)
        if not len(tensors["exits"]) == len(tensors["weight"]) == len(tensors["bias"]):
            raise ValueError(f"{text} names a file with different numbers of exits, weights and biases")
        return cls(bound, tuple(tensors["exits"].tolist()), tensors["weight"].float(), tensors["bias"].float(), file)

    def __str__(self) -> str:
        return f"{self.name}:{self.file}:{self.bound:g}"


def _unit(hidden: Tensor) -> Tensor:
    """[n, H] float32 at unit root mean square: what grows with depth is no sign of anything."""
    return rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)


def _load(
    kind: type[ExitPolicy], text: str, file: str, ranks: Mapping[str, int], device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors of `file`, which must be those of `ranks`: name -> number of dimensions. Raises ValueError."""
    if not file:
        raise ValueError(f"{text} names no file; write {kind.example}")
    try:
        tensors = load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{text} names {file}, which is no readable safetensors file ({error})") from error
    if {name: tensor.dim() for name, tensor in tensors.items()} != dict(ranks):
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise ValueError(
            f"{text} names {file}, which holds {found}; valid are {', '.join(ranks)} of {kind.__name__}.save"
        )
    return tensors
