# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import SHARED_LIMIT, compile_for
from vllm_spec_plugins.kernels.tree_walk import tree_walk_kernel

SIGNATURE = {
    "tokens_ptr": "*i64",
    "tokens_row_stride": "i32",
    "parents_ptr": "*i64",
    "parents_row_stride": "i32",
    "drawn_ptr": "*i64",
    "drawn_row_stride": "i32",
    "wrong_ptr": "*i1",
    "wrong_row_stride": "i32",
    "path_ptr": "*i64",
    "num_accepted_ptr": "*i64",
    "emitted_ptr": "*i64",
    "num_emitted_ptr": "*i64",
    "num_nodes": "i32",
    "max_depth": "i32",
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("has_wrong", "rows", "rounds", "num_warps"), [(False, 256, 8, 4), (True, 64, 4, 1)])
def test_compiles_without_spilling(capability: int, has_wrong: bool, rows: int, rounds: int, num_warps: int) -> None:
    constexprs = {"HAS_WRONG": has_wrong, "ROUNDS": rounds, "BLOCK_ROWS": rows, "BLOCK_DEPTH": 32}
    if not has_wrong:
        constexprs["wrong_ptr"] = None
    usage = compile_for(tree_walk_kernel, SIGNATURE, constexprs, capability, num_warps=num_warps, num_stages=3)
    assert usage.spills == 0, usage
    assert usage.shared <= SHARED_LIMIT[89], usage
