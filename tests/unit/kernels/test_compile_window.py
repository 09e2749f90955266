# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import window

POINTERS = "cells level start slots lengths emitted drawn eos ngrams real"
SIGNATURE = {
    **{f"{name}_ptr": "*i64" for name in POINTERS.split()},
    **dict.fromkeys(("row_stride", "rows", "width", "draws", "ends"), "i32"),
    "token_ids_ptr": "*i32",
}


@pytest.mark.parametrize("capability", [80, 90])
def test_a_window_fits_in_registers(capability: int) -> None:
    ones = {"rows": 1, "width": 1, "ends": 1}  # what is 1 at run time is a constant of its own type
    for rows, width, warps, more in [(4, 16, 1, {}), (16, 64, 4, {}), (1, 1, 1, ones)]:
        blocks = {"BLOCK_R": rows, "BLOCK_W": width, **more}
        usage = compile_for(window._advance_kernel, SIGNATURE, blocks, capability, warps, 1)
        assert usage.spills == 0
        assert usage.shared < 99 << 10
