# SPDX-License-Identifier: Apache-2.0
"""When waiting requests may join the running ones, so that requests of like depth share steps.

A step costs what its deepest row costs, so one request at the start of its answer makes a step deep for everybody. Requests that
are admitted together go down the schedule together. docs/cohorts.md has the simulation that chose this rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_spec_plugins.layers.schedule import Schedule


@dataclass(frozen=True)
class Cohorts:
    """Admission in waves: who waits comes in together, at once where that makes no step deeper, else within a bound.

    Attributes:
        schedule: the layers of each place.
        wait: steps after which a held request opens the wave for all that wait.
    """

    schedule: Schedule
    wait: int

    def opens(self, running: Sequence[int], waiting: Sequence[int], held: Sequence[int]) -> bool:
        """Whether the waiting requests are admitted in this step, as many as there is room for.

        Args:
            running: place of each running request's next row; negative while its prompt is read, at full depth.
            waiting: place at which each waiting request, at least one, will go on: 0, or behind the tokens that a
                preempted one has.
            held: steps that each waiting request could have been admitted in and was not.
        """
        if not running or max(held) >= self.wait:
            return True
        deepest = min(running)
        return deepest < 0 or self.schedule.budget(max(waiting)) <= self.schedule.budget(deepest)
