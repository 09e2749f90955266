# SPDX-License-Identifier: Apache-2.0
"""The governor against a simulated machine: it keeps the drafts that pay on it, and no others."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest

from vllm_spec_plugins.engine.governor import Draft, Governor


@dataclass
class Machine:
    """Seconds per decode step: base + rows, drafting and proposing on top; 5% off, one in fifty ten times as long."""

    base: float
    row: float
    drafting: float
    rng: random.Random
    proposing: float = 5e-5

    def run(self, batch: int, nodes: int, asked: bool) -> float:
        return self.true(batch, nodes, asked) * self.rng.gauss(1.0, 0.05) * (10.0 if self.rng.random() < 0.02 else 1.0)

    def true(self, batch: int, nodes: int, asked: bool) -> float:
        return self.base + self.row * (batch + nodes) + self.drafting * (nodes > 0) + self.proposing * asked


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    print(f"SEED={seed}")
    return random.Random(seed)


def serve(
    governor: Governor, machine: Machine, chances: list[float], promised: float, nodes: int, steps: int = 600
) -> tuple[float, list[float]]:
    """Serve requests whose drafts are chains of `nodes`, a node right with chances[request] if the one before it is.

    Returns the true speed of the second half relative to plain decoding, and the share of steps drafted per request.
    """
    batch, rng = len(chances), machine.rng
    tokens = seconds = 0.0
    drafted = [0] * batch
    chosen: set[str] = set()
    for step in range(steps):
        asked = governor.asks(batch)
        late = step >= steps // 2
        for request in range(batch):
            count = 0
            if str(request) in chosen:
                while count < nodes and rng.random() < chances[request]:
                    count += 1
                governor.accepted(str(request), count)
                drafted[request] += late
            tokens += late * (1 + count)
        rows = nodes * len(chosen)
        governor.observe(batch, rows, machine.run(batch, rows, asked))
        seconds += late * machine.true(batch, rows, asked)
        chosen = governor.choose(batch, [Draft(str(r), nodes, promised) for r in range(batch)] if asked else [])
    plain = batch / machine.true(batch, 0, asked=False)
    return tokens / seconds / plain, [2 * count / steps for count in drafted]


def test_drafts_that_pay_are_verified(rng: random.Random) -> None:
    speed, drafted = serve(Governor(), Machine(4e-3, 1e-4, 3e-4, rng), [0.8], promised=3.0, nodes=8)
    assert drafted[0] > 0.95
    assert speed > 2.0


@pytest.mark.parametrize(
    ("row", "drafting", "chance"),
    [(1e-5, 4e-3, 0.3), (2e-3, 1e-4, 0.3), (1e-4, 3e-4, 0.02)],
    ids=["drafting is dear", "rows are dear", "nothing comes true"],
)
def test_drafts_that_do_not_pay_are_left_out(rng: random.Random, row: float, drafting: float, chance: float) -> None:
    speed, drafted = serve(Governor(), Machine(4e-3, row, drafting, rng), [chance] * 4, promised=2.0, nodes=8)
    assert max(drafted) < 0.15
    assert speed > 0.96  # the looks at what was declined cost something


@pytest.mark.parametrize("chance", [0.05, 0.3])
def test_a_dear_proposer_is_asked_rarely_when_it_does_not_pay(rng: random.Random, chance: float) -> None:
    """Verifying alone might pay (chance 0.3: 0.43 tokens for 10% of a step), finding the drafts costs 60%."""
    machine = Machine(4e-3, 5e-5, 1e-4, rng, proposing=2.4e-3)
    speed, drafted = serve(Governor(), machine, [chance], promised=0.5, nodes=4, steps=1200)
    assert max(drafted) < 0.15
    assert speed > 0.96


def test_a_dear_proposer_that_pays_is_asked_always(rng: random.Random) -> None:
    machine = Machine(4e-3, 5e-5, 1e-4, rng, proposing=1.2e-3)
    speed, drafted = serve(Governor(), machine, [0.7], promised=1.5, nodes=4)
    assert drafted[0] > 0.9
    assert speed > 1.5


def test_each_request_is_judged_by_what_its_own_drafts_bring(rng: random.Random) -> None:
    _, drafted = serve(Governor(), Machine(4e-3, 2e-4, 3e-4, rng), [0.9, 0.05], promised=3.0, nodes=8)
    assert drafted[0] > 0.9
    assert drafted[1] < 0.2


def test_a_machine_that_changes_is_noticed(rng: random.Random) -> None:
    governor = Governor()
    cheap, dear = Machine(4e-3, 1e-4, 3e-4, rng), Machine(4e-3, 4e-3, 3e-4, rng)
    assert serve(governor, cheap, [0.5], promised=1.0, nodes=4)[1][0] > 0.9
    assert serve(governor, dear, [0.5], promised=1.0, nodes=4)[1][0] < 0.15
    assert serve(governor, cheap, [0.5], promised=1.0, nodes=4, steps=2000)[1][0] > 0.9


def test_what_a_request_showed_is_forgotten_with_it() -> None:
    governor = Governor()
    governor.choose(1, [Draft("a", 4, 2.0)])
    governor.accepted("a", 0)
    assert "a" in governor.trust
    governor.forget(["a", "b"])
    assert governor.trust == {}


def test_a_draft_that_was_not_chosen_teaches_nothing() -> None:
    governor = Governor()
    governor.accepted("a", 3)
    assert governor.everyone.factor(1.0) == 1.0
    assert governor.choose(3, [Draft("a", 0, 0.0)]) == set()


def test_an_idle_governor_goes_on_asking_now_and_then_and_wakes_up() -> None:
    governor = Governor()
    for _ in range(60):
        governor.choose(1, [])
    # A step that was not asked for a tree has none to choose from.
    asked = [governor.asks(1) for _ in range(40)]
    assert sum(asked) == 40 // Governor.NAPS[0]
    governor.choose(1, [Draft("a", 8, 6.0)])
    assert all(governor.asks(1) for _ in range(8))


def test_a_step_in_which_nothing_runs_is_no_mistake() -> None:
    """The last request may have ended between what a step was scheduled for and what it proposed."""
    governor = Governor()
    for _ in range(2 * Governor.SOONEST):
        governor.asks(0)
        assert governor.choose(0, []) == set()
        governor.choose(0, [Draft("a", 4, 2.0)])
