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

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# What triton itself wrote in Triton shows whether the interpreter took.
assert isinstance(tl.sum, InterpretedFunction), "TRITON_INTERPRET=1 did not turn Triton's interpreter on"
