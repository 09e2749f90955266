# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a model a draft may skip: a search that needs no training, only scores.

SWIFT (arXiv 2410.06916, section 4): the first and the last layer always run, of the blocks between about 45% are skipped,
random candidates take turns with steps of Bayesian optimisation, and a candidate's score is how often its greedy guesses
agree with text that the full model has written. Beside SWIFT's sets the exits after each layer are candidates (LayerSkip,
arXiv 2404.16710), and the share that is skipped may move: candidates are compared by tokens per cost.

Nothing here looks at a clock or at anything but its seed and the scores: told the same, every tensor-parallel rank comes to
the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_spec_plugins.layers.plan import LayerPlan

# Nodes and weights of Gauss-Hermite quadrature for a standard normal.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()

# Sets that are looked at for one candidate, of each kind; scored plans that the Gaussian process knows.
POOL, REMEMBERED = 128, 200


@dataclass(frozen=True)
class Costs:
    """What the parts of a forward pass cost, in one unit: each attention block, each MLP block, and what always runs (the
    LM head).
    """

    attention: float = 1.0
    mlp: float = 1.0
    rest: float = 0.0

    def of(self, plan: LayerPlan) -> float:
        """Cost of a pass of `plan`; 1 is a pass of the whole model."""
        return float(self.of_blocks(_runs(plan)[None])[0])

    def of_blocks(self, runs: np.ndarray) -> np.ndarray:
        """[n] float64, the same for each of `runs` [n, 2, L] bool: the attention blocks that run, the MLP blocks."""
        part = runs.sum(2) @ np.array([self.attention, self.mlp])
        whole = (self.attention + self.mlp) * runs.shape[2]
        return (part + self.rest) / (whole + self.rest)


def tokens_per_cost(agreement: np.ndarray, cost: np.ndarray, depth: int) -> np.ndarray:
    """[n] tokens per cost of one pass of the full model, which is what plain decoding takes for one.

    A draft of g tokens, each accepted with chance a if those before it were, brings 1 + a + ... + a^g tokens for g passes of
    cost c and one of cost 1 (Leviathan et al., arXiv 2211.17192, theorem 3.8). g is the best of 1 to `depth`. Not of 0: then all
    plans that do not pay would be worth the same, and nothing would lead from them to those that do.

    Args:
        agreement, cost: [n] float64, a and c.
    """
    drafts = np.arange(depth + 1)
    tokens = np.cumsum(np.asarray(agreement)[..., None] ** drafts, axis=-1)
    return (tokens / (drafts * np.asarray(cost)[..., None] + 1.0))[..., 1:].max(-1)


class Score(NamedTuple):
    """Agreement of a plan's guesses with `tokens` tokens of text, and of the best plan's with the same ones.

    `reference` None: all scores are of the same text. `tokens` 0: the agreement is exact.
    """

    plan: LayerPlan
    agreement: float
    reference: float | None = None
    tokens: int = 0


class SkipSearch:
    """A search in rounds: `propose` a plan, `tell` its score. All that it does follows from its settings and what it was told.

    Args:
        num_layers: L of the model.
        skip_share: blocks that candidates skip, of the 2 L; they skip from two thirds of that to four thirds.
        depth: tokens of a draft, at most.
        rounds: it ends after so many scores,
        patience: or after so many in a row without a better plan.
        model_every: every so many rounds the candidate is the one that a Gaussian process of all scores expects most of.
        start: the best plan until one is found that is better; None: the skipped layers stand evenly between the others.

    Attributes:
        best: the best plan so far.
        agreement: what is known of its agreement; None before its first score.
        scores: all that it was told, in order; telling another search the same resumes this one.
        challenger: a plan that is to be scored again, on other text, before it can be the best; None: there is none.

    Raises ValueError for a model without a layer between the first and the last.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        skip_share: float = 0.45,
        depth: int = 6,
        costs: Costs | None = None,
        rounds: int = 400,
        patience: int = 100,
        model_every: int = 2,
        start: LayerPlan | None = None,
        seed: int = 0,
    ) -> None:
        if num_layers < 3:
            raise ValueError(f"a model of {num_layers} layers has none between the first and the last")
        self.num_layers, self.depth, self.costs = num_layers, depth, costs or Costs()
        self.rounds, self.patience, self.model_every = rounds, patience, model_every
        free = 2 * (num_layers - 2)
        wanted = skip_share * 2 * num_layers
        self.most = int(min(free, max(1, round(wanted * 4 / 3))))
        self.least = int(min(self.most, max(1, round(wanted * 2 / 3))))
        self.seed = seed
        self.best = start or self._evenly(round(skip_share * num_layers))
        self.agreement: float | None = None
        self.scores: list[Score] = []
        self._known: dict[LayerPlan, tuple[float, int]] = {}  # agreement beside the best plan's, and of how many tokens
        self._first = list(dict.fromkeys((self.best, *self._exits())))
        self._proposed: LayerPlan | None = None
        self._improved_at = 0
        self._exhausted = False
        self.challenger: LayerPlan | None = None

    @property
    def settled(self) -> bool:
        """The search is over."""
        since = len(self.scores) - max(self._improved_at, len(self._first))
        return self._exhausted or len(self.scores) >= self.rounds or since >= self.patience

    def value(self, agreement: float, plan: LayerPlan) -> float:
        """Tokens per cost of `plan` if its guesses agree so often."""
        return float(tokens_per_cost(np.array([agreement]), np.array([self.costs.of(plan)]), self.depth)[0])

    def propose(self) -> LayerPlan:
        """The plan to be scored next; the same one until something is told. After a settled search, `best`."""
        if self._proposed is None and not self.settled:
            first = next((plan for plan in self._first if plan not in self._known), None)
            self._proposed = first or self._candidate()
        return self._proposed or self.best

    def tell(self, plan: LayerPlan, agreement: float, reference: float | None = None, tokens: int = 0) -> None:
        """A score, see `Score`. The first is that of the best plan.

        With `tokens`, a plan that is better than the best one is the `challenger` until it is told again, of other text: the
        highest of many scores is too high, a second one is not.
        """
        if self.agreement is None and plan != self.best:
            raise ValueError(f"the first score is that of the best plan, {self.best}")
        self.scores.append(Score(plan, agreement, reference, tokens))
        self._proposed = None
        # What it would be beside the best plan's usual agreement: this text may be harder, or easier.
        usual = agreement if reference is None else agreement + (self.agreement or 0.0) - reference
        before, weight = self._known.get(plan, (0.0, 0))
        share = tokens / (weight + tokens) if tokens else 1.0
        self._known[plan] = (float(np.clip(before + (usual - before) * share, 0.0, 1.0)), weight + tokens)
        if plan == self.best:
            self.agreement = self._known[plan][0]
            return
        assert self.agreement is not None
        again, self.challenger = plan == self.challenger, None if plan == self.challenger else self.challenger
        if self.value(agreement, plan) <= self.value(self.agreement if reference is None else reference, self.best):
            return
        if again or not tokens:
            self.best, self.agreement = plan, self._known[plan][0]
            self._improved_at = len(self.scores)
        else:
            self.challenger = plan

    def _evenly(self, skipped: int) -> LayerPlan:
        between = self.num_layers - 2
        skipped = min(max(skipped, 1), between)
        layers = {1 + (2 * i + 1) * between // (2 * skipped) for i in range(skipped)}
        return LayerPlan.skipping(self.num_layers, layers, layers)

    def _exits(self) -> list[LayerPlan]:
        """Exits after each layer, or after eight spread over a deep model."""
        exits = np.unique(np.linspace(1, self.num_layers - 1, min(8, self.num_layers - 1)).round().astype(int))
        return [LayerPlan.prefix(self.num_layers, int(layer)) for layer in exits]

    def _candidate(self) -> LayerPlan | None:
        turn = len(self.scores)
        self.rng = np.random.default_rng((self.seed, turn))
        by_model = turn % self.model_every == 0
        if by_model:
            runs = np.concatenate((self._random(POOL), self._near(self._leaders(), POOL)))
        else:
            runs = self._random(POOL) if turn % 4 == 1 else self._near([self.best], POOL)
        runs = self._unknown(runs)
        if not len(runs):
            # Chance may have missed what is left of a small space; of a large one something is always new.
            runs = self._unknown(self._random(16 * POOL))
        if not len(runs):
            self._exhausted = True
            return None
        attention, mlp = runs[int(self._expected(runs).argmax()) if by_model else 0].tolist()
        return LayerPlan(tuple(attention), tuple(mlp))

    def _unknown(self, runs: np.ndarray) -> np.ndarray:
        known = {_runs(plan).tobytes() for plan in self._known}
        return runs[[each.tobytes() not in known for each in runs]]

    def _leaders(self) -> list[LayerPlan]:
        return sorted(self._known, key=lambda plan: -self.value(self._known[plan][0], plan))[:4]

    def _random(self, count: int) -> np.ndarray:
        """[count, 2, L] bool: sets that run, the skipped ones drawn from between the first and the last layer."""
        order = self.rng.random((count, 2 * (self.num_layers - 2))).argsort(1).argsort(1)
        return self._with_ends(order >= self.rng.integers(self.least, self.most + 1, (count, 1)))

    def _near(self, plans: Sequence[LayerPlan], count: int) -> np.ndarray:
        """[count, 2, L] bool: a block of one of `plans` skipped, one run, or both, within the limits."""
        rows = np.stack([_runs(plan)[:, 1:-1].reshape(-1) for plan in plans])
        inner = rows[self.rng.integers(len(plans), size=count)]  # [count, K]
        # Skipped ones first, in random order: a number to skip is a number of places in it.
        order = np.where(inner, 1.0, 0.0) + self.rng.random(inner.shape) * 0.5
        kind = self.rng.integers(3, size=count)  # 0: skip one more, 1: run one more, 2: both
        wanted = np.clip((~inner).sum(1) + (kind == 0) - (kind == 1), self.least, self.most)
        line = np.arange(count)[kind == 2]
        order[line, order[kind == 2].argmin(1)] += 2.0
        return self._with_ends(order.argsort(1).argsort(1) >= wanted[:, None])

    def _with_ends(self, inner: np.ndarray) -> np.ndarray:
        """[n, 2, L] of [n, 2 (L - 2)]: the first and the last layer run."""
        runs = np.ones((len(inner), 2, self.num_layers), dtype=bool)
        runs[:, :, 1:-1] = inner.reshape(len(inner), 2, -1)
        return runs

    def _expected(self, runs: np.ndarray) -> np.ndarray:
        """[n] expected improvement of sets `runs` [n, 2, L] over the best plan, in tokens per cost."""
        known = list(self._known)[-REMEMBERED:]
        agreement, tokens = (np.array(column) for column in zip(*(self._known[plan] for plan in known), strict=True))
        # A share of n tokens; with the prior's two, so that none and all are not taken for certain.
        spread = (agreement * tokens + 1) / (tokens + 2)
        noise = np.where(tokens > 0, spread * (1 - spread) / np.maximum(tokens, 1), 0.0)
        mean, deviation = posterior(_signs(np.stack(list(map(_runs, known)))), agreement, noise, _signs(runs))
        likely = np.clip(mean[:, None] + deviation[:, None] * _NODES, 0.0, 0.999)
        cost = np.broadcast_to(self.costs.of_blocks(runs)[:, None], likely.shape)
        assert self.agreement is not None
        gain = tokens_per_cost(likely, cost, self.depth) - self.value(self.agreement, self.best)
        return np.maximum(gain, 0.0) @ _WEIGHTS


def posterior(
    known: np.ndarray, values: np.ndarray, noise: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [m] of a Gaussian process at `asked` [m, K], given `values` [n] at `known` [n, K].

    Points are vectors of signs. Half of the prior variance is linear in the signs (each block has a worth of its own), half
    falls off with the number of differing signs (how blocks play together). Rasmussen and Williams, "Gaussian Processes for
    Machine Learning", algorithm 2.1.

    Args:
        noise: [n], the values' variances.
    """
    size = known.shape[1]
    centre = values.mean()
    variance = max(float(values.var()), 1e-4)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        likeness = a @ b.T / size
        return variance * (0.5 * likeness + 0.5 * np.exp((likeness - 1.0) * 4.0))

    factor = np.linalg.cholesky(kernel(known, known) + np.diag(noise + 1e-3 * variance))
    cross = np.linalg.solve(factor, kernel(known, asked))
    mean = centre + cross.T @ np.linalg.solve(factor, values - centre)
    return mean, np.sqrt(np.maximum(variance - (cross**2).sum(0), 1e-12))


def _runs(plan: LayerPlan) -> np.ndarray:
    """[2, L] bool: which attention blocks run, which MLP blocks."""
    return np.array((plan.attention, plan.mlp))


def _signs(runs: np.ndarray) -> np.ndarray:
    """[n, 2 L] float64 of [n, 2, L]: 1 for a block that runs, -1 for one that does not."""
    return runs.reshape(len(runs), -1) * 2.0 - 1.0
