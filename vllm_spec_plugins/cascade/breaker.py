# SPDX-License-Identifier: Apache-2.0
"""Keeps requests away from an upstream that fails them."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Open after `failures` failed calls in a row, for `cooldown` seconds; then one call may try, and decides.

    Every call that `allows` let through ends in one of `succeeded`, `failed` and `abandoned`.
    """

    def __init__(self, failures: int, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._cooldown, self._clock = failures, cooldown, clock
        self._failed = 0
        self._until = 0.0
        self._trying = False

    @property
    def _open(self) -> bool:
        return self._failed >= self._most

    @property
    def allows(self) -> bool:
        return not self._open or (self._clock() >= self._until and not self._trying)

    @property
    def wait(self) -> float:
        """Seconds until a call may try."""
        return max(0.0, self._until - self._clock()) if self._open else 0.0

    def begin(self) -> None:
        self._trying = self._trying or self._open

    def succeeded(self) -> None:
        self._failed, self._trying = 0, False

    def failed(self) -> None:
        self._failed, self._trying = self._failed + 1, False
        if self._open:
            self._until = self._clock() + self._cooldown

    def abandoned(self) -> None:
        """The call says nothing about the upstream: it was cancelled, or refused for what it asked."""
        self._trying = False
