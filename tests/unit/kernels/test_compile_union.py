# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import union
from vllm_spec_plugins.kernels.selection import digit_for

SIGNATURE = {
    **{f"{name}_ptr": "*i64" for name in ("tokens", "parents", "source", "out_tokens", "out_parents")},
    **{f"{name}_ptr": "*fp64" for name in ("odds", "weights", "chance", "out_chance")},
    **dict.fromkeys(("many", "sources", "nodes", "limit", "max_depth"), "i32"),
    **dict.fromkeys(("least_bits", "most_bits"), "i64"),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("rows", "nodes", "warps"), [(64, 32, 1), (512, 128, 8)])
def test_the_nodes_of_a_forest_fit_in_registers(rows: int, nodes: int, warps: int, capability: int) -> None:
    odds = compile_for(union._odds_kernel, SIGNATURE, {"BLOCK_M": rows}, capability, min(warps, 4), 1)
    blocks = {"BLOCK_R": rows, "BLOCK_N": nodes, "DIGIT": digit_for(rows, warps)}
    merged = compile_for(union._union_kernel, SIGNATURE, blocks, capability, warps, 1)
    for usage in (odds, merged):
        assert usage.spills == 0
        assert usage.shared < 99 << 10


def test_what_is_one_at_run_time_is_compiled_as_a_constant() -> None:
    odds = {"nodes": 1, "BLOCK_M": 1}
    assert compile_for(union._odds_kernel, SIGNATURE, odds, 90, 1, 1).spills == 0
    ones = {"many": 1, "sources": 1, "nodes": 1, "max_depth": 1}
    merged = {**ones, "BLOCK_R": 2, "BLOCK_N": 1, "DIGIT": 7}
    assert compile_for(union._union_kernel, SIGNATURE, merged, 90, 1, 1).spills == 0
