# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import calibration

INTEGERS = "slots lengths emitted tokens parents source offered_at"
SIGNATURE = {
    **{f"{name}_ptr": "*i64" for name in INTEGERS.split()},
    **{f"{name}_ptr": "*fp64" for name in ("odds", "counts", "new", "all", "found")},
    **dict.fromkeys(("row_stride", "columns", "nodes", "sources", "max_depth", "batch"), "i32"),
    **dict.fromkeys(("memory_bits", "prior_bits", "extreme_bits"), "i64"),
    "token_ids_ptr": "*i32",
}


@pytest.mark.parametrize("capability", [80, 90])
def test_the_nodes_of_a_forest_fit_in_registers(capability: int) -> None:
    ones = {"nodes": 1, "sources": 1, "max_depth": 1}  # what is 1 at run time is a constant of its own type
    for kernel, blocks, warps in [
        (calibration._observe_kernel, {"BLOCK_R": 512}, 4),
        (calibration._observe_kernel, {"BLOCK_R": 2, **ones}, 1),
        (calibration._together_kernel, {"BLOCK_B": 32}, 1),
        (calibration._together_kernel, {"BLOCK_B": 1, "sources": 1}, 1),
        (calibration._factors_kernel, {"BLOCK_S": 8}, 1),
        (calibration._factors_kernel, {"BLOCK_S": 1, "sources": 1}, 1),
    ]:
        usage = compile_for(kernel, SIGNATURE, blocks, capability, warps, 1)
        assert usage.spills == 0
        assert usage.shared < 99 << 10
