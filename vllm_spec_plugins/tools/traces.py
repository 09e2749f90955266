# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive over time: made from a seed, or recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds from the start, and the tokens of its prompt and of its answer."""

    seconds: float
    prompt: int
    output: int

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.prompt < 1 or self.output < 1:
            raise ValueError(f"{self}: a request comes at 0 s or later, with 1 token or more in its prompt and answer")


def poisson(count: int, rate: float, prompt: int, outputs: tuple[int, int], seed: int, burst: int = 1) -> list[Arrival]:
    """`count` requests at `rate` per second, in bursts of `burst` that come together; a Poisson process of the bursts.

    Args:
        prompt: tokens of every prompt.
        outputs: fewest and most tokens of an answer, uniform between.
    """
    if rate <= 0 or not 1 <= outputs[0] <= outputs[1] or burst < 1:
        raise ValueError(f"rate={rate:g}, outputs={outputs}, burst={burst}: all must be positive, and fewest <= most")
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(burst / rate, -(-count // burst))).repeat(burst)[:count]
    lengths = rng.integers(outputs[0], outputs[1] + 1, count)
    return [Arrival(float(t - times[0]), prompt, int(n)) for t, n in zip(times, lengths, strict=True)]


def read(path: Path) -> list[Arrival]:
    """A recorded trace, JSON lines ``{"seconds": 0.5, "prompt": 100, "output": 200}``, in order of time.

    Raises ValueError with the line that is not one.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Arrival(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; write {{'seconds': 0.5, 'prompt': 100, 'output': 200}}"
            ) from error
    if not found:
        raise ValueError(f"{path} has no arrivals")
    return sorted(found, key=lambda arrival: arrival.seconds)
