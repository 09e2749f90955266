# SPDX-License-Identifier: Apache-2.0
"""Early-exit policies: is a token's shallow answer good enough?

A policy scores what is known of a token after some of the layers; the larger the score, the safer the answer that the
final norm and the LM head give there. A draft that stops where a policy says no stays lossless; a token that is kept
because a policy says yes does not, and wants a calibrated bound (calibration.py).

No policy takes anything from the device to the host, so all may be asked inside a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vllm_spec_plugins.layers.exit_policy import ExitPolicy, ExitSignals
from vllm_spec_plugins.layers.recorded_exits import Gate, Hash

__all__ = ["POLICIES", "ExitPolicy", "ExitSignals", "policy"]


def entropy(logits: Tensor) -> Tensor:
    """[M] float32, nats, of the distributions of logits [M, V], which may hold -inf."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


class Entropy(ExitPolicy):
    """Entropy at most `bound` nats: BranchyNet (Teerapittayanon et al., arXiv 1709.01686), DeeBERT (arXiv 2004.12993)."""

    name, example, most = "entropy", "entropy:1.5", math.inf

    @property
    def threshold(self) -> float:
        return -self.bound

    def score(self, signals: ExitSignals) -> Tensor:
        return -entropy(signals.logits)


class NormalisedEntropy(Entropy):
    """Entropy by that of a uniform distribution, H / log V, at most `bound`: FastBERT (Liu et al., arXiv 2004.02178)."""

    name, example, most = "normalised-entropy", "normalised-entropy:0.2", 1.0

    def score(self, signals: ExitSignals) -> Tensor:
        return super().score(signals) / math.log(signals.logits.shape[-1])


class Confidence(ExitPolicy):
    """Largest probability at least `bound`."""

    name, example = "confidence", "confidence:0.6"

    def score(self, signals: ExitSignals) -> Tensor:
        return signals.logits.float().softmax(-1).amax(-1)


class Margin(ExitPolicy):
    """Largest probability less the second, at least `bound`: CALM's softmax response (Schuster et al., arXiv 2207.07061)."""

    name, example = "margin", "margin:0.4"

    def score(self, signals: ExitSignals) -> Tensor:
        first, second = signals.logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second


class Patience(ExitPolicy):
    """The same likeliest token at `bound` consecutive exits: PABEE (Zhou et al., arXiv 2006.04152), whose patience is one less,
    the times that an exit agreed with the one before.
    """

    name, example, least, most = "patience", "patience:2", 2.0, 64.0

    @property
    def exits_needed(self) -> int:
        return int(self.bound)

    def score(self, signals: ExitSignals) -> Tensor:
        same = signals.earlier == signals.logits.argmax(-1, keepdim=True)
        return 1.0 + same.flip(1).float().cumprod(1).sum(1)

    @classmethod
    def _bound(cls, text: str, number: str) -> float:
        bound = super()._bound(text, number)
        if bound != int(bound):
            raise ValueError(f"{text} has {number!r} where a whole number belongs; write {cls.example}")
        return bound


class Saturation(ExitPolicy):
    """Cosine of the hidden states of this exit and the one before, at least `bound`: CALM (arXiv 2207.07061).

    At the first exit of a pass nothing is good.
    """

    name, example, least = "saturation", "saturation:0.95", -1.0

    @property
    def exits_needed(self) -> int:
        return 2

    def score(self, signals: ExitSignals) -> Tensor:
        if signals.earlier_hidden is None:
            return torch.full(signals.tokens.shape, -math.inf, device=signals.tokens.device)
        return cosine_similarity(signals.hidden.float(), signals.earlier_hidden.float(), dim=-1)


POLICIES: dict[str, type[ExitPolicy]] = {
    kind.name: kind for kind in (Entropy, NormalisedEntropy, Confidence, Margin, Patience, Saturation, Hash, Gate)
}


def policy(text: str, device: torch.device | str = "cpu") -> ExitPolicy:
    """From the text of a setting: `entropy:1.5`, `hash:FILE`, `gate:FILE:0.8` (FILE may hold colons).

    Raises ValueError, with a clause that begins with the text and says what is wrong with it and what would be valid.
    """
    kind = POLICIES.get(text.partition(":")[0])
    if kind is None:
        raise ValueError(f"{text} is no exit policy; valid are {', '.join(each.example for each in POLICIES.values())}")
    return kind.parse(text, device)
