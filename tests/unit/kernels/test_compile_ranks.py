# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import ranks

SIGNATURE = {
    **{f"{name}_ptr": "*i64" for name in ("offered", "offered_at", "slots", "lengths", "emitted")},
    **{f"{name}_ptr": "*fp32" for name in ("hits", "seen", "new", "first", "chance", "all_hits", "all_seen")},
    **dict.fromkeys(("row_stride", "depth", "per_depth", "batch"), "i32"),
    "token_ids_ptr": "*i32",
    "keep": "fp32",
    "prior": "fp32",
}


@pytest.mark.parametrize("capability", [80, 90])
def test_the_ranks_of_a_request_fit_in_the_registers_of_a_warp(capability: int) -> None:
    ones = {"depth": 1, "per_depth": 1}  # what is 1 at run time is a constant of its own type
    cells = {"BLOCK_D": 16, "BLOCK_K": 64}
    for kernel, blocks in [
        (ranks._judge_kernel, cells),
        (ranks._judge_kernel, {"BLOCK_D": 1, "BLOCK_K": 1, **ones}),
        (ranks._together_kernel, {"BLOCK_B": 1, "BLOCK_K": 1, **ones}),
        (ranks._chances_kernel, {"BLOCK_D": 1, "BLOCK_K": 1, **ones}),
        (ranks._together_kernel, {"BLOCK_B": 32, "BLOCK_K": 64}),
        (ranks._chances_kernel, cells),
    ]:
        usage = compile_for(kernel, SIGNATURE, blocks, capability, 1, 1)
        assert usage.spills == 0
        assert usage.shared < 99 << 10
