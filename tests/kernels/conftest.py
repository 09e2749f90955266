# SPDX-License-Identifier: Apache-2.0
"""Kernels under Triton's interpreter, on CPU tensors, in a process of their own: triton reads the switch when it is imported."""

from __future__ import annotations

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError(
        "tests/kernels needs a process of its own (make kernels): triton was imported without its interpreter"
    )
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.kernels.cases import Cases, random_cases
from vllm_spec_plugins.cpu import interpreted

# Some tests import vllm: that it finds the interpreter must not hang on which of them comes first.
interpreted.enable()

# What triton itself wrote in Triton shows whether the interpreter took.
assert isinstance(tl.sum, InterpretedFunction), "TRITON_INTERPRET=1 did not turn Triton's interpreter on"


@pytest.fixture(autouse=True)
def _kernels_are_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the package that stands beside a kernel is not to find it by itself, whatever a test before has switched on."""
    from vllm_spec_plugins import compiled

    monkeypatch.setattr(compiled, "use_kernels", False)


@pytest.fixture
def cases(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Cases:
    """`for draw in cases(kernel, ...)`: random cases, until each kernel was compared in enough of them."""
    return lambda *kernels: random_cases(rng, monkeypatch, kernels)
