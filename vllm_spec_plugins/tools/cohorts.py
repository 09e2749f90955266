# SPDX-License-Identifier: Apache-2.0
"""Which admission policy serves SkipDecode best: a simulation, step by step, from what steps cost.

    python -m vllm_spec_plugins.tools.bench cohorts --rate 0.1 --rate 1 --cohort-wait 64

No server and no model. What is compared is when requests start; the tokens of all policies are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.table import Table

from vllm_spec_plugins.layers.cohorts import Cohorts
from vllm_spec_plugins.layers.schedule import Schedule
from vllm_spec_plugins.tools.traces import Arrival

# (layers of the deepest row, layers of all rows, milliseconds): a model of 24 layers, batch 8, one CPU core.
MEASURED = ((24, 192, 206.0), (24, 128, 205.0), (24, 80, 181.0), (8, 64, 76.0))
LAYERS = 24
MAX_BATCHED = 2048  # tokens of a step


@dataclass(frozen=True)
class StepCost:
    """Milliseconds of a step: fixed + layer * (layers of its deepest row) + row * (layers of all rows, summed).

    The rows of a prompt run all layers and cost what other rows cost.
    """

    fixed: float
    layer: float
    row: float

    @classmethod
    def fit(cls, measured: Sequence[tuple[int, int, float]] = MEASURED) -> StepCost:
        """Least squares. Raises ValueError when the measurements do not tell the three apart or make one negative."""
        table = np.array(measured, float)
        factors = np.column_stack([np.ones(len(table)), table[:, 0], table[:, 1]])
        found, _, rank, _ = np.linalg.lstsq(factors, table[:, 2], rcond=None)
        if rank < 3 or min(found) < 0:
            raise ValueError(f"{len(table)} step times do not give a cost each of a step, a layer and a row: {found}")
        return cls(*map(float, found))

    @classmethod
    def read(cls, path: Path) -> StepCost:
        """`fit` to JSON lines ``{"deepest": 24, "layers": 192, "milliseconds": 206}``."""
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return cls.fit([(line["deepest"], line["layers"], line["milliseconds"]) for line in lines])

    def __call__(self, deepest: int, layers: int) -> float:
        return self.fixed + self.layer * deepest + self.row * layers


class Opens(Protocol):
    """When the waiting requests are admitted; arguments as in `Cohorts.opens`."""

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool: ...


@dataclass(frozen=True)
class AtOnce(Cohorts):
    """vLLM's own scheduler: who fits is admitted."""

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool:
        return True


@dataclass(frozen=True)
class ToTheBound(Cohorts):
    """Whoever waits, waits to the bound or until nothing runs."""

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool:
        return not running or max(held) >= self.wait


@dataclass(frozen=True)
class AtTheBottom(ToTheBound):
    """Until those who run are at the last level."""

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool:
        return super().opens(running, waiting, held) or self.schedule.budget(min(running)) == self.schedule.min_layers


@dataclass(frozen=True)
class Majority(ToTheBound):
    """Until as many wait as run."""

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool:
        return super().opens(running, waiting, held) or len(waiting) >= len(running)


@dataclass(frozen=True)
class Payback(ToTheBound):
    """Until waiting has cost what joining costs (the ski-rental rule): layers of the steps that the requests have waited
    through, summed over them, against layers by which joining deepens the steps to come, times those who run.
    """

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool:
        if super().opens(running, waiting, held) or (place := min(running)) < 0:
            return True
        # A row at place p makes the steps that a new one makes, without the first p of them.
        spared = self.schedule.budgets[: min(place, self.schedule.max_tokens)] - self.schedule.min_layers
        deepens = int(spared.sum()) + self.schedule.num_layers - self.schedule.budget(place)
        return sum(held) * self.schedule.budget(place) >= deepens * len(running)


Runs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def deep_first(budgets: np.ndarray, paused: np.ndarray) -> np.ndarray:
    """Only the deepest rows run, the others pause until they have been caught up with."""
    return budgets == budgets.max()


def in_turns(budgets: np.ndarray, paused: np.ndarray) -> np.ndarray:
    """One level runs, the one that has paused longest."""
    return budgets == budgets[np.argmax(paused)]


@dataclass(frozen=True)
class Policy:
    """A line of the table.

    Attributes:
        admission: from the schedule and the bound.
        runs: layers of the rows [n], steps that each has paused [n] -> those that run; None: all. Rows that have paused
            `wait` steps run in any case.
        since_arrival: steps without a free place count towards the bound too.
    """

    name: str
    admission: Callable[[Schedule, int], Opens]
    runs: Runs | None = None
    since_arrival: bool = False


SHIPPED = "join the first level"
POLICIES = (
    Policy("at once (vLLM)", AtOnce),
    Policy(SHIPPED, Cohorts),
    Policy(f"{SHIPPED}, bound from arrival", Cohorts, since_arrival=True),
    Policy("to the bound", ToTheBound),
    Policy("until all are at the last level", AtTheBottom),
    Policy("until as many wait as run", Majority),
    Policy("until waiting has cost as much", Payback),
    Policy("at once, deep rows first", AtOnce, deep_first),
    Policy("at once, levels in turns", AtOnce, in_turns),
)


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one trace; times in seconds.

    Attributes:
        first_token: median and 99th percentile, from arrival.
        per_token: mean over the requests of the time between two tokens.
        answer: mean time from arrival to the last token.
        longest_held: most steps that a request was held.
        depth: layers of the mean step.
    """

    policy: str
    speedup: float
    tokens_per_second: float
    first_token: tuple[float, float]
    per_token: float
    answer: float
    longest_held: int
    steps: int
    depth: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class _Rows:
    """All requests of a trace, [n] each. `place` is that of the next row; negative: tokens of the prompt that are unread. The
    steps that a request was held, in the queue at all, and paused; the seconds of its first and last token.
    """

    place: np.ndarray
    outputs: np.ndarray
    held: np.ndarray = field(init=False)
    queued: np.ndarray = field(init=False)
    paused: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False)
    last: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.held, self.queued, self.paused = np.zeros((3, len(self.place)), int)
        self.first, self.last = np.zeros((2, len(self.place)))


def simulate(
    trace: Sequence[Arrival], schedule: Schedule, policy: Policy, wait: int, cost: StepCost, slots: int
) -> Outcome:
    """Serve `trace` with at most `slots` requests at a time. Requests are admitted in the order of their arrival."""
    times = np.array([arrival.seconds for arrival in trace])
    rows = _Rows(np.array([-arrival.prompt for arrival in trace]), np.array([arrival.output for arrival in trace]))
    admission = policy.admission(schedule, wait)
    running: list[int] = []
    waiting: list[int] = []
    clock, steps, layers, coming = 0.0, 0, 0, 0
    while coming < len(trace) or waiting or running:
        if not waiting and not running:
            clock = max(clock, times[coming])
        while coming < len(trace) and times[coming] <= clock:
            waiting.append(coming)
            coming += 1
        room = slots - len(running)
        if waiting and room:
            counted = rows.queued if policy.since_arrival else rows.held
            places = [int(rows.place[i]) for i in running]
            if admission.opens(places, [0] * len(waiting), [int(counted[i]) for i in waiting]):
                running, waiting = running + waiting[:room], waiting[room:]
            else:
                rows.held[waiting] += 1
        rows.queued[waiting] += 1
        deepest, milliseconds = _step(np.array(running), rows, schedule, policy, wait, cost)
        clock, steps, layers = clock + milliseconds / 1e3, steps + 1, layers + deepest
        now = np.array(running)
        begun = now[(rows.place[now] >= 0) & (rows.first[now] == 0)]
        rows.first[begun] = clock
        done = rows.place[now] >= rows.outputs[now] - 1  # the prompt's last row has given the first token
        rows.last[now[done]] = clock
        running = now[~done].tolist()
    first, answer = rows.first - times, rows.last - times
    between = (rows.last - rows.first)[rows.outputs > 1] / (rows.outputs - 1)[rows.outputs > 1]
    return Outcome(
        policy=policy.name,
        speedup=round(schedule.num_layers / schedule.average, 2),
        tokens_per_second=float(rows.outputs.sum() / (rows.last.max() - times[0])),
        first_token=(float(np.median(first)), float(np.percentile(first, 99))),
        per_token=float(between.mean()) if len(between) else 0.0,
        answer=float(answer.mean()),
        longest_held=int(rows.held.max()),
        steps=steps,
        depth=layers / steps,
    )


def _step(
    now: np.ndarray, rows: _Rows, schedule: Schedule, policy: Policy, wait: int, cost: StepCost
) -> tuple[int, float]:
    """Move the requests `now` on by a step; returns the layers of its deepest row, and its milliseconds."""
    place = rows.place[now]
    reads = place < 0
    runs = ~reads
    if policy.runs is not None:
        # A prompt is read first, alone among them: its step runs all layers, and rows that ride along would mix levels.
        runs &= (rows.paused[now] >= wait) | (
            np.zeros(len(now), bool) if reads.any() else policy.runs(schedule.of_places(place), rows.paused[now])
        )
    room, tokens = MAX_BATCHED - int(runs.sum()), 0
    for i in now[reads]:
        chunk = min(-int(rows.place[i]), room - tokens)
        rows.place[i] += chunk
        tokens += chunk
    budgets = schedule.of_places(place[runs])
    rows.place[now[runs]] += 1
    rows.paused[now[runs]] = 0
    rows.paused[now[~runs & ~reads]] += 1
    deepest = schedule.num_layers if tokens else int(budgets.max())
    return deepest, cost(deepest, int(budgets.sum()) + tokens * schedule.num_layers)


def compare(
    trace: Sequence[Arrival], speedups: Sequence[float], wait: int, cost: StepCost, slots: int, layers: int = LAYERS
) -> list[Outcome]:
    """All policies at each of the `speedups`; before them the same trace with all layers."""
    full = Schedule(layers, layers, layers)
    found = [simulate(trace, full, Policy("all layers", AtOnce), wait, cost, slots)]
    for speedup in speedups:
        schedule = Schedule.for_speedup(layers, speedup)
        found += [simulate(trace, schedule, policy, wait, cost, slots) for policy in POLICIES]
    return found


def table(outcomes: Sequence[Outcome], title: str) -> Table:
    """The outcomes of one trace; ratios are to vLLM's own admission at the same schedule."""
    caption = "simulated; first token and whole answer: seconds from arrival; held: most steps; depth: layers of the mean step"
    made = Table(title=title, caption=caption, caption_justify="left")
    for name in ("schedule", "admission"):
        made.add_column(name, no_wrap=True)
    for name in ("tokens/s", "ratio", "first token", "p99", "ms/token", "answer", "held", "depth"):
        made.add_column(name, justify="right")
    plain = {o.speedup: o.tokens_per_second for o in outcomes if o.policy == POLICIES[0].name}
    speedup = None
    for o in outcomes:
        if speedup not in (None, o.speedup):
            made.add_section()
        ratio = f"{o.tokens_per_second / plain[o.speedup]:.2f}" if o.speedup in plain else ""
        made.add_row(
            f"{o.speedup:g}x" if o.speedup != speedup else "",
            o.policy,
            f"{o.tokens_per_second:.1f}",
            ratio,
            *(f"{value:.2f}" for value in o.first_token),
            f"{o.per_token * 1e3:.0f}",
            f"{o.answer:.1f}",
            str(o.longest_held),
            f"{o.depth:.1f}",
        )
        speedup = o.speedup
    return made
