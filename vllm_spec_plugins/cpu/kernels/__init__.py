# SPDX-License-Identifier: Apache-2.0
"""NumPy and torch versions of Model Runner V2's Triton kernels: qualified kernel name -> replacement."""

from __future__ import annotations

from collections.abc import Callable

from vllm_spec_plugins.cpu.kernels import (
    blocks,
    drafting,
    grammar,
    inputs,
    likelihoods,
    logprobs,
    penalties,
    rejection,
    sampling,
    speculation,
)
from vllm_spec_plugins.cpu.kernels.launch import NeedsGrid

KERNELS: dict[str, Callable[..., None] | NeedsGrid] = {
    name: replacement
    for area in (inputs, blocks, sampling, penalties, logprobs, grammar, speculation, likelihoods, rejection, drafting)
    for name, replacement in area.KERNELS.items()
}
