# SPDX-License-Identifier: Apache-2.0
"""Every kernel is compared in CASES random cases: which test does it can be read off the sources, and cannot be forgotten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from tests.kernels.cases import CASES, Cases
from vllm_spec_plugins import kernels

HERE = Path(__file__).parent
SOURCES = sorted(path for path in Path(kernels.__file__).parent.glob("*.py") if path.stem != "__init__")


def launched_in(source: str) -> set[str]:
    """Functions in Triton that are launched: written kernel[grid](...)."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    named = (call.value for call in calls if isinstance(call, ast.Subscript))
    return {name.id for name in named if isinstance(name, ast.Name) and name.id.endswith("_kernel")}


def compared_in(source: str) -> set[str]:
    """What stands in `for draw in cases(module.kernel, ...)`."""
    loops = (node.iter for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For))
    asked = (loop for loop in loops if isinstance(loop, ast.Call) and getattr(loop.func, "id", "") == "cases")
    return {argument.attr for loop in asked for argument in loop.args if isinstance(argument, ast.Attribute)}


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_every_kernel_of_a_file_is_compared_in_the_test_of_that_name(path: Path) -> None:
    launched = launched_in(path.read_text())
    assert bool(launched) == (path.stem != "selection")
    if launched:
        assert compared_in((HERE / f"test_{path.stem}.py").read_text()) == launched


def test_a_kernel_that_no_test_compares_is_seen() -> None:
    """The control."""
    assert launched_in("_a_kernel[(1,)](x)\nb_kernel[n, 1](x, N=2)\nboxes[0](x)") == {"_a_kernel", "b_kernel"}
    assert compared_in("for draw in cases(m._a_kernel):\n    pass\nm.b_kernel()") == {"_a_kernel"}


@triton.jit
def _always(x_ptr):
    pass


@triton.jit
def _sometimes(x_ptr):
    pass


def test_cases_go_on_until_every_kernel_was_launched_in_enough_of_them(cases: Cases) -> None:
    x, count, seldom = torch.zeros(1), 0, 0
    for draw in cases(_always, _sometimes):
        count += 1
        _always[(1,)](x)
        draw.number(0, 1 << 30)
        if count % 2:
            _sometimes[(1,)](x)
            seldom += 1
    assert seldom == CASES >= 50
    assert count == 2 * CASES - 1


@pytest.mark.parametrize(("every", "widest", "sentence"), [(5, 1 << 30, "_always"), (1, 3, "different")])
def test_a_kernel_that_is_hardly_launched_and_cases_that_are_the_same_are_refused(
    every: int, widest: int, sentence: str, cases: Cases
) -> None:
    def run(draws: Iterator[object]) -> None:
        for count, draw in enumerate(draws):
            if count % every == 0:
                _always[(1,)](torch.zeros(1))
            draw.number(0, widest)  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match=sentence):
        run(cases(_always))
