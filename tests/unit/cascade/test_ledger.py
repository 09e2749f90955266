# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_spec_plugins.cascade.breaker import Breaker
from vllm_spec_plugins.cascade.ledger import Bill, Entry, Ledger, Outcome, Price


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def enter(bill: Bill, outcome: Outcome, cost: float = 0.0) -> str:
    attempt = bill.attempt()
    bill.add(Entry(bill.request, attempt, bill.tenant, "s", "u", "m", outcome, 1, 1, cost))
    return attempt


def test_a_price_is_per_token() -> None:
    assert Price(2e-6, 10e-6).of(1_000_000, 100_000) == pytest.approx(3.0)


def test_completed_calls_of_an_answered_request_are_billed_once_and_one_of_them_is_the_answer(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", 100.0, Clock())
    bill = ledger.open("r", "t")
    enter(bill, "failed")
    enter(bill, "completed", 2.0)
    last = enter(bill, "completed", 3.0)
    assert (bill.cost, bill.attempts) == (5.0, 3)
    bill.settle(last)
    assert [(e.attempt, e.billed, e.answer) for e in bill.entries] == [
        ("r-0", False, False),
        ("r-1", True, False),
        ("r-2", True, True),
    ]
    assert ledger.billed("t") == 5.0
    with pytest.raises(AssertionError, match="settled"):
        bill.settle(last)
    with pytest.raises(AssertionError, match="settled"):
        enter(bill, "completed", 1.0)


def test_an_attempt_is_entered_once() -> None:
    bill = Ledger(None, 100.0).open("r", "t")
    attempt = enter(bill, "failed")
    with pytest.raises(AssertionError, match="twice"):
        bill.add(Entry("r", attempt, "t", "s", "u", "m", "completed"))


def test_a_request_without_an_answer_is_not_billed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", 100.0, Clock())
    bill = ledger.open("r", "t")
    enter(bill, "completed", 2.0)
    bill.settle(None)
    assert ledger.billed("t") == 0.0
    assert json.loads((tmp_path / "l").read_text())["cost"] == 2.0


def test_bills_leave_the_window_and_outlive_a_restart(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "l"
    ledger = Ledger(path, 100.0, clock)
    for cost in (1.0, 2.0):
        bill = ledger.open(f"r{cost}", "t")
        bill.settle(enter(bill, "completed", cost))
        clock.now += 60.0
    ledger.close()
    again = Ledger(path, 100.0, clock)
    # The first is 120 seconds old, the second 60.
    assert again.billed("t") == 2.0
    assert again.billed("other") == 0.0
    clock.now += 41.0
    assert again.billed("t") == 0.0


def test_a_line_that_a_crash_cut_short_is_dropped_and_other_damage_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path, 100.0, Clock())
    bill = ledger.open("r", "t")
    bill.settle(enter(bill, "completed", 1.0))
    ledger.close()
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    again = Ledger(path, 100.0, Clock())
    assert again.billed("t") == 1.0
    assert path.read_text() == whole
    again.close()
    path.write_text(whole + "nonsense\n")
    with pytest.raises(ValueError, match="line 2"):
        Ledger(path, 100.0)


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_call_try_after_the_cooldown() -> None:
    clock = Clock()
    breaker = Breaker(2, 10.0, clock)
    for outcome in (breaker.failed, breaker.succeeded, breaker.failed):
        breaker.begin()
        outcome()
    assert breaker.allows
    breaker.begin()
    breaker.failed()
    assert not breaker.allows
    assert breaker.wait == 10.0
    clock.now += 10.0
    assert breaker.allows
    breaker.begin()
    assert not breaker.allows  # one at a time
    breaker.failed()
    assert breaker.wait == 10.0
    clock.now += 10.0
    breaker.begin()
    breaker.abandoned()
    assert breaker.allows
    breaker.begin()
    breaker.succeeded()
    breaker.begin()
    breaker.failed()
    assert breaker.allows
