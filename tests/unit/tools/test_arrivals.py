# SPDX-License-Identifier: Apache-2.0
"""Requests over time: what the table says of the replies, rounds in turn, prompts of a given length."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_spec_plugins.tools import arrivals, bench, measurements, speed
from vllm_spec_plugins.tools.arrivals import Held, Reply, Row
from vllm_spec_plugins.tools.load import PROMPTS, TARGET
from vllm_spec_plugins.tools.traces import Arrival

TRACE = [Arrival(0.0, 5, 3), Arrival(1.0, 7, 3)]
LINE = "... Cohorts: {} requests were held, the longest {} of at most 64 steps\n"
LOG = LINE.format(3, 9) + LINE.format(2, 64)


class FakeServer:
    def __init__(self, name: str, seconds: float, log: Path) -> None:
        self.name, self.seconds, self.log = name, seconds, log
        self.paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


def test_figures_are_counted_from_each_arrival() -> None:
    row = Row("x")
    row.enter(TRACE, [Reply(0.5, 1.5, 3), Reply(0.1, 3.1, 3)])
    assert row.tokens_per_second == [pytest.approx(6 / 4.1)]
    assert row.first_token_median == [pytest.approx(0.3)]
    assert row.first_token_p99 == [pytest.approx(0.5, rel=0.01)]
    assert row.per_token == [pytest.approx((0.5 + 1.5) / 2)]


def test_the_log_says_how_long_requests_were_held() -> None:
    assert Held.read(LOG) == Held(5, 64, 64)
    assert Held.read("nothing of the kind") is None


def test_every_server_gets_the_trace_in_turn_while_the_others_stand_still(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "with").write_text(LOG)
    (tmp_path / "without").write_text("")
    servers = [FakeServer("vllm", 2.0, tmp_path / "without"), FakeServer("plugin", 1.0, tmp_path / "with")]
    order: list[tuple[str, int]] = []

    def send(server: FakeServer, trace: Sequence[Arrival], prompts: Sequence[Any]) -> list[Reply]:
        assert [s.paused for s in servers] == [s is not server for s in servers]
        order.append((server.name, sum(arrival.output for arrival in trace)))
        return [Reply(0.5, server.seconds, arrival.output) for arrival in trace]

    monkeypatch.setattr(arrivals, "send", send)
    configurations = [speed.plain()[0], speed.plugin("lookahead")]
    rows = arrivals.measure(configurations, servers, TRACE, [[1], [2]], 2, lambda _: None)  # type: ignore[arg-type]
    assert [name for name, _ in order] == ["vllm", "plugin", "vllm", "plugin", "plugin", "vllm"]
    assert rows[1].ratio == [pytest.approx(3 / 2)] * 2
    assert (rows[0].held, rows[1].held) == (None, Held(5, 64, 64))
    text = io.StringIO()
    Console(file=text, width=200).print(arrivals.table(rows, "title"))
    assert "1.50 (1.50 to 1.50)" in text.getvalue()
    assert "64 of 64 steps" in text.getvalue()
    assert rows[1].as_dict()["held"] == {"requests": 5, "longest": 64, "bound": 64}


def test_prompts_have_the_lengths_that_were_asked_for(seed: int) -> None:
    found = arrivals.cut_prompts(TARGET, PROMPTS, TRACE, seed)
    assert [len(prompt) for prompt in found] == [5, 7]
    assert found == arrivals.cut_prompts(TARGET, PROMPTS, TRACE, seed)
    with pytest.raises(ValueError, match="tokens; a prompt of 100000000 was asked for"):
        arrivals.cut_prompts(TARGET, PROMPTS, [Arrival(0.0, 10**8, 1)], seed)


def test_a_plain_server_and_one_per_plugin_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def servers(configurations: Sequence[speed.Configuration], *_: Any) -> Any:
        started.extend(c.name for c in configurations)
        raise ValueError("enough")

    monkeypatch.setattr(measurements, "_servers", servers)
    assert bench.main(["arrivals", "--plugin", "lookahead", "--plugin", "none"]) == 2
    assert started == [speed.PLAIN, "--plugin lookahead", "--plugin none"]
