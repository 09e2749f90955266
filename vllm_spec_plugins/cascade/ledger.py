# SPDX-License-Identifier: Apache-2.0
"""What each call of an upstream cost, and who is billed for it, once."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Outcome = Literal["completed", "failed", "cancelled"]


@dataclass(frozen=True)
class Price:
    """Cost of a token, in any one currency."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        return self.input * input_tokens + self.output * output_tokens


@dataclass(frozen=True)
class Entry:
    """One call of one upstream.

    Attributes:
        attempt: the id that the upstream was given with the call; no two entries share one.
        outcome: only completed calls have tokens and a cost.
        answer: this call's text went to the client: true for one entry of each answered request, for none of the others.
        billed: the client pays: the completed calls of requests that got an answer.
    """

    request: str
    attempt: str
    tenant: str
    stage: str
    upstream: str
    model: str
    outcome: Outcome
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    answer: bool = False
    billed: bool = False
    time: float = 0.0


class Ledger:
    """All entries since the start, summed; written as JSON lines to a file, if there is one.

    A request's entries are written together when it is settled. At start the file is read again, so that budgets outlive a
    restart; a last line that a crash cut short is dropped.

    Args:
        path: the file, None for none. Raises ValueError, naming the line, when it holds something else.
        window: seconds over which a tenant's bills count against its budget.
    """

    def __init__(self, path: Path | None, window: float, clock: Callable[[], float] = time.time) -> None:
        self._window, self._clock = window, clock
        self._recent: dict[str, deque[tuple[float, float]]] = defaultdict(deque)
        self._billed: dict[str, float] = defaultdict(float)
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._read(path)

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            assert self._file is not None
            os.ftruncate(self._file, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._count(Entry(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is not an entry of a ledger ({error})") from error

    def _count(self, entry: Entry) -> None:
        if entry.billed:
            self._recent[entry.tenant].append((entry.time, entry.cost))
            self._billed[entry.tenant] += entry.cost

    def billed(self, tenant: str) -> float:
        """What `tenant` was billed within the window."""
        recent = self._recent[tenant]
        while recent and recent[0][0] <= self._clock() - self._window:
            self._billed[tenant] -= recent.popleft()[1]
        return self._billed[tenant] if recent else 0.0

    def open(self, request: str, tenant: str) -> Bill:
        return Bill(self, request, tenant)

    def write(self, entries: list[Entry]) -> None:
        """Count and keep a settled request's entries."""
        for entry in entries:
            self._count(entry)
        if self._file is not None and entries:
            # One write to the end of the file: entries of two requests do not mix.
            os.write(self._file, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries).encode())

    def now(self) -> float:
        return self._clock()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Bill:
    """One request's calls, until it is settled."""

    def __init__(self, ledger: Ledger, request: str, tenant: str) -> None:
        self.request, self.tenant = request, tenant
        self.entries: list[Entry] = []
        self._ledger, self._begun, self._settled = ledger, 0, False

    @property
    def cost(self) -> float:
        """Of all calls completed so far."""
        return sum(entry.cost for entry in self.entries)

    @property
    def attempts(self) -> int:
        """Calls begun so far."""
        return self._begun

    def attempt(self) -> str:
        """The id of the next call."""
        self._begun += 1
        return f"{self.request}-{self._begun - 1}"

    def add(self, entry: Entry) -> None:
        assert not self._settled, f"request {self.request} is settled"
        assert entry.attempt not in {other.attempt for other in self.entries}, f"{entry.attempt} is entered twice"
        self.entries.append(replace(entry, time=self._ledger.now()))

    def settle(self, answered: str | None) -> None:
        """Close the request: the attempt that was its answer, or None when it got none and pays nothing."""
        assert not self._settled, f"request {self.request} is settled"
        self._settled = True
        assert answered is None or any(e.attempt == answered and e.outcome == "completed" for e in self.entries)
        billed = answered is not None
        self.entries = [
            replace(e, answer=e.attempt == answered, billed=billed and e.outcome == "completed") for e in self.entries
        ]
        self._ledger.write(self.entries)

    @property
    def settled(self) -> bool:
        return self._settled
