# SPDX-License-Identifier: Apache-2.0
"""`bench kernels` where there is no GPU: its sentence, what it makes of figures, and what it checks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vllm_spec_plugins.tools import cli, kernel_cases, kernels
from vllm_spec_plugins.tools.kernel_cases import Case, Mismatch, Setup, equal
from vllm_spec_plugins.tools.kernels import Figure, Machine

MACHINE = Machine("GPU", "9.0", 132, 141.0, 50.0, "13.0", "3.6.0", copy=4e12, matmul=8e14)


def figure(milliseconds: float, bound: str = "", **given: object) -> Figure:
    return Figure("tree_attention", "batch 8", "", [milliseconds] * 3, bound=bound, **given)  # type: ignore[arg-type]


def test_without_a_gpu_it_stops_with_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels", "--json", str(tmp_path / "kernels.json")]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"error: bench kernels measures on a CUDA GPU, and torch {torch.__version__} finds none on this machine"
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_time_is_the_median_and_the_shares_are_of_what_was_measured_in_the_same_run() -> None:
    found = Figure("k", "s", "", [5.0, 1.0, 2.0], int(6e9), {"other": [1.0, 4.0, 8.0]})
    assert found.time == 2.0
    assert found.achieved(MACHINE) == pytest.approx(
        {"share of the copy": 3e12 / 4e12, "share of a step": 2.0 / 3.5, "time to other": 0.5}
    )


@pytest.mark.parametrize(
    ("milliseconds", "bound", "met"),
    [
        (1.0, "share of the copy >= 0.8", True),
        (1.3, "share of the copy >= 0.8", False),
        (0.03, "share of a step <= 0.01", True),
        (0.04, "share of a step <= 0.01", False),
        (1.9, "time to other <= 1", True),
        (2.1, "time to other <= 1", False),
        (1.0, "", None),
    ],
)
def test_a_target_is_met_or_missed(milliseconds: float, bound: str, met: bool | None) -> None:
    assert figure(milliseconds, bound, traffic=int(3.6e9), beside={"other": [2.0]}).met(MACHINE) is met


def test_every_target_asks_for_something_that_is_measured() -> None:
    """A bound on what no figure has would end a measurement when it is over."""
    names = {"share of the copy", "share of a step", f"time to {kernel_cases.REFERENCE}"}
    for setups in kernel_cases.CASES.values():
        for setup in setups:
            what, relation, limit = (setup.bound or "share of a step <= 1").rsplit(" ", 2)
            assert what in names and relation in (">=", "<=") and float(limit) > 0


def test_what_is_wrong_is_said_and_neither_timed_nor_called_a_success() -> None:
    def fails(launch: Callable[[], object]) -> None:
        raise Mismatch("out: 3 of 8 values differ")

    def never(launch: Callable[[], object]) -> list[float]:
        raise AssertionError("timed")

    setup = Setup("s", 0, lambda device: Case("k", lambda: None, fails), "share of a step <= 1")
    found = kernels._figure(setup, "cpu", never)
    assert found.wrong == "out: 3 of 8 values differ"
    assert found.as_dict(MACHINE) == {"kernel": "k", "shape": "s", "wrong": "out: 3 of 8 values differ"}


def test_cases_are_made_one_at_a_time_checked_and_then_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def setup(name: str) -> Setup:
        def make(device: str) -> Case:
            order.append(f"make {name} on {device}")
            launch, other = (lambda: order.append(f"launch {name}")), (lambda: order.append(f"other {name}"))
            return Case("k", launch, lambda _: order.append(f"check {name}"), beside={"other": other})

        return Setup(name, 0, make)

    def stopwatch(launch: Callable[[], object]) -> list[float]:
        launch()
        return [1.0]

    monkeypatch.setitem(kernels.CASES, "k", [setup("a"), setup("b")])
    found = kernels.measure(["k"], stopwatch, "cpu", order.append)
    assert [each.shape for each in found] == ["a", "b"]
    each = ["k, {0}", "make {0} on cpu", "check {0}", "other {0}", "launch {0}"]
    assert order == [step.format(name) for name in "ab" for step in each]


def test_the_tables_say_what_was_met_what_was_missed_and_what_is_wrong() -> None:
    given = {"traffic": int(3.6e9), "beside": {"vLLM's": [2.0]}}
    figures = [
        figure(1.0, "share of the copy >= 0.8", **given),
        figure(2.0, "share of the copy >= 0.8", **given),
        Figure("tree_walk", "batch 64", "path: 1 of 2 values differ"),
    ]
    console = Console(file=io.StringIO(), width=200)
    for table in kernels.tables(MACHINE, figures):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "90.0%" in text and "45.0%" in text and "28.57%" in text and "3600" in text and "0.50" in text
    assert text.count(": met") == text.count(": MISSED") == 1
    assert "NO: path: 1 of 2 values differ" in text
    assert "4000 GB/s" in text and "3.50 ms" in text
    assert json.loads(json.dumps([each.as_dict(MACHINE) for each in figures]))[1]["met"] is False


def test_few_launches_of_what_takes_long_and_many_of_what_does_not() -> None:
    assert [kernels.repetitions(ms) for ms in (0.0, 0.01, 3.0, 1000.0)] == [200, 200, 100, 15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_difference_is_found_and_named(dtype: torch.dtype, rng: torch.Generator) -> None:
    right = (torch.randn(4, 5, generator=rng) * 100).to(dtype)
    equal("out", right.clone(), right)
    wrong = right.clone()
    wrong[2, 3] += 50
    with pytest.raises(Mismatch, match=r"out: 1 of 20 values differ, first at \[2, 3\]"):
        equal("out", wrong, right)
    with pytest.raises(Mismatch, match="shape"):
        equal("out", right[:3], right)


def test_what_is_not_a_number_is_a_difference() -> None:
    with pytest.raises(Mismatch, match="1 of 2"):
        equal("out", torch.tensor([1.0, float("nan")]), torch.ones(2))
