# SPDX-License-Identifier: Apache-2.0
"""What an answer cache needs of the place that keeps the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class CacheError(RuntimeError):
    """The cache cannot be opened, or its store or embedder does not answer now; the message is one sentence."""


@dataclass(frozen=True)
class Limits:
    """What a store may hold.

    Attributes:
        entries: answers.
        bytes: of all answers with their vectors.
        remembered: keys without an answer whose weights are kept.
    """

    entries: int
    bytes: int
    remembered: int


@dataclass(frozen=True)
class Vector:
    """The embedding of a stored answer's question.

    Attributes:
        revision: grows with every answer put into the store; the larger one is the newer.
        key: of the answer.
        group: only questions of one group are compared.
        data: [d] float32, as bytes in the machine's order.
    """

    revision: int
    key: str
    group: str
    data: bytes


class Store(Protocol):
    """Answers by key under the rule of `eviction.Bookkeeping`; several processes may use one at once.

    Every method may be called from any thread, is one transaction, and raises CacheError when the store does not answer.
    """

    def get(self, key: str, now: float) -> bytes | None:
        """One request for `key` at `now`, counted whether its answer is here or not."""
        ...

    def put(self, key: str, data: bytes, cost: float, now: float, group: str = "", vector: bytes = b"") -> bool:
        """Keep an answer that costs `cost` to make again, or replace the one under its key; afterwards those with the least
        scores are gone until the limits hold. False: so is this one.
        """
        ...

    def vectors(self, after: int) -> list[Vector]:
        """Those of answers put after revision `after`, oldest first."""
        ...

    def size(self) -> tuple[int, int]:
        """Answers stored, and their bytes."""
        ...

    def close(self) -> None:
        """Let go of files and connections; the answers stay."""
        ...
