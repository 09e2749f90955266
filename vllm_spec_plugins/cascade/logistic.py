# SPDX-License-Identifier: Apache-2.0
"""Small logistic models of "this answer is good": on a prompt's n-grams, or on an answer's figures."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BITS = 12  # of a hashed n-gram: 4096 features
READ = 8192  # characters of a prompt that are looked at, half of them from its end

FIGURES = ("log_tokens", "mean", "low", "least", "mean_logprob", "unsure", "log_question")


def ngrams(text: str) -> np.ndarray:
    """[2^BITS] float64 of length 1: hashed words, pairs of words and runs of three characters, each with a sign.

    The "hashing trick" (Weinberger et al., arXiv 0902.2206): CRC-32 says where and which sign, the same in every process.
    """
    if len(text) > READ:
        text = text[: READ // 2] + "\n" + text[-READ // 2 :]
    text = text.lower()
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    grams += [f"#{text[i : i + 3]}" for i in range(len(text) - 2)]
    features = np.zeros(1 << BITS)
    for gram in grams:
        code = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
        features[code & ((1 << BITS) - 1)] += 1.0 if code >> 31 else -1.0
    return features / (float(np.linalg.norm(features)) or 1.0)


def figures(question: str, logprobs: Sequence[float]) -> np.ndarray:
    """[len(FIGURES)] float64 of one answer: its length, its tokens' probabilities, the question's length."""
    found = np.exp(np.asarray(logprobs if len(logprobs) else [-20.0], dtype=np.float64))
    return np.array(
        [
            math.log1p(len(logprobs)),
            found.mean(),
            np.quantile(found, 0.1),
            found.min(),
            np.log(found.clip(1e-9)).mean(),
            (found < 0.5).mean(),
            math.log1p(len(question)),
        ]
    )


@dataclass(frozen=True, eq=False)
class Logistic:
    """P(good) = 1 / (1 + exp(-(bias + weights . (x - mean) / scale))); weights, mean, scale [D]."""

    weights: np.ndarray
    bias: float
    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, features: np.ndarray) -> float:
        logit = self.bias + float(self.weights @ ((features - self.mean) / self.scale))
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, logit))))

    def as_dict(self) -> dict[str, object]:
        vectors = {name: [float(f"{x:.6g}") for x in getattr(self, name)] for name in ("weights", "mean", "scale")}
        # One number stands for a vector of equals.
        short = {key: values[0] if len(set(values)) == 1 else values for key, values in vectors.items()}
        return {"bias": float(f"{self.bias:.6g}"), **short}

    @classmethod
    def from_dict(cls, given: object, dimension: int) -> Logistic:
        """What `as_dict` gave. Raises ValueError when it is something else."""
        try:
            vectors = []
            for name in ("weights", "mean", "scale"):
                vector = np.asarray(given[name], dtype=np.float64)  # type: ignore[index]
                vectors.append(np.broadcast_to(vector, (dimension,)))
            bias = float(given["bias"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"is not a logistic model of {dimension} features ({error})") from error
        weights, mean, scale = vectors
        if not (np.isfinite(weights).all() and np.isfinite(mean).all() and (scale > 0).all() and math.isfinite(bias)):
            raise ValueError("holds numbers that are no weights")
        return cls(weights, bias, mean, scale)


def fit(features: np.ndarray, good: np.ndarray, decay: float, standardise: bool) -> Logistic:
    """The model of least mean log-loss + decay / 2 * |weights|^2, by Nesterov's accelerated gradient; the bias is free.

    Args:
        features: [n, D].
        good: [n] of 0 and 1. Raises ValueError when all are equal: there is nothing to tell apart.
        decay: > 0.
        standardise: to mean 0 and deviation 1 per feature, for figures of different units.
    """
    good = np.asarray(good, dtype=np.float64)
    if good.min() == good.max():
        raise ValueError(f"all {len(good)} recorded answers are {'good' if good[0] else 'bad'}; both kinds are needed")
    width = features.shape[1]
    mean = features.mean(0) if standardise else np.zeros(width)
    deviation = features.std(0) if standardise else np.ones(width)
    # A feature that is always the same has a deviation of rounding errors.
    scale = np.where(deviation > 1e-9 * (1.0 + np.abs(mean)), deviation, 1.0)
    x = np.concatenate(((features - mean) / scale, np.ones((len(features), 1))), 1)
    penalty = np.full(width + 1, decay)
    penalty[-1] = 0.0
    # The log-loss's curvature is at most a quarter of the data's.
    step = 1.0 / (0.25 * float((x * x).sum(1).mean()) + decay)
    weights, ahead, momentum = np.zeros(width + 1), np.zeros(width + 1), 1.0
    for _ in range(3000):
        chance = 1.0 / (1.0 + np.exp(-(x @ ahead).clip(-60, 60)))
        gradient = x.T @ (chance - good) / len(good) + penalty * ahead
        if float(np.abs(gradient).max()) < 1e-6:
            break
        new, following = ahead - step * gradient, (1.0 + math.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        ahead = new + (momentum - 1.0) / following * (new - weights)
        weights, momentum = new, following
    return Logistic(ahead[:-1], float(ahead[-1]), mean, scale)
