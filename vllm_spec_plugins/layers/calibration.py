# SPDX-License-Identifier: Apache-2.0
"""A bound for a lossy rule, with a guarantee: "Learn then Test".

Angelopoulos et al., "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control", arXiv 2110.01052, as
CALM uses it (Schuster et al., "Confident Adaptive Language Modeling", arXiv 2207.07061, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# (mean losses [T] float64 of n prompts, n, tolerance) -> p-values [T] float64 of "the risk is above the tolerance".
PValue = Callable[[np.ndarray, int, float], np.ndarray]


def hoeffding(risk: np.ndarray, count: int, tolerance: float) -> np.ndarray:
    """exp(-2 n max(0, d - R)^2): Hoeffding's inequality, as in CALM."""
    return np.exp(-2.0 * count * np.maximum(tolerance - risk, 0.0) ** 2)


def hoeffding_bentkus(risk: np.ndarray, count: int, tolerance: float) -> np.ndarray:
    """min(exp(-n KL(min(R, d) || d)), e P(Bin(n, d) <= ceil(n R))), KL that of two coins: never larger than `hoeffding`'s.

    The Hoeffding-Bentkus p-value of Learn then Test, from Bates et al., arXiv 2101.02703.
    """
    low = np.minimum(risk, tolerance)
    with np.errstate(divide="ignore", invalid="ignore"):
        hit = np.where(low > 0, low * np.log(low / tolerance), 0.0)
    divergence = hit + (1.0 - low) * (np.log1p(-low) - math.log1p(-tolerance))
    log_pmf = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(tolerance)
        + (count - k) * math.log1p(-tolerance)
        for k in range(count + 1)
    ]
    at_most = np.cumsum(np.exp(log_pmf))
    bentkus = math.e * at_most[np.minimum(np.ceil(count * risk), count).astype(np.int64)]
    return np.minimum(np.minimum(np.exp(-count * divergence), bentkus), 1.0)


def boldest(losses: np.ndarray, tolerance: float, error: float, p_value: PValue = hoeffding) -> int | None:
    """The boldest of T settings whose risk, its mean loss on prompts to come, may be taken to be at most `tolerance`.

    Fixed-sequence testing: from the safest setting on, each is accepted while the p-value of "its risk is above the
    tolerance" is at most `error`; the first that fails ends the search. To accept a setting that is too bold the first such
    one must pass its test, so the chance of it is at most `error`, however many settings there are.

    That holds if the prompts are drawn like those to come and independently, if the settings and their order were fixed
    before the losses were looked at, and if nothing else was fitted on these prompts.

    Args:
        losses: [n, T] in [0, 1], of n calibration prompts under each setting, safest first.
        tolerance: d, in (0, 1).
        error: e, in (0, 1).
        p_value: `hoeffding` or `hoeffding_bentkus`.

    Returns its column, or None where not even the safest is accepted. Raises ValueError on values out of range.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or not losses.size:
        raise ValueError(f"losses of shape {list(losses.shape)} are not those of prompts under settings, [n, T]")
    if not (losses.min() >= 0.0 and losses.max() <= 1.0):
        raise ValueError(f"losses from {losses.min():g} to {losses.max():g} are not within 0 to 1")
    for name, value in (("tolerance", tolerance), ("error", error)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}={value:g} is not between 0 and 1")
    rejected = p_value(losses.mean(0), len(losses), tolerance) > error
    accepted = int(rejected.argmax()) if rejected.any() else losses.shape[1]
    return accepted - 1 if accepted else None
