# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import Usage, compile_for
from vllm_spec_plugins.kernels import growth
from vllm_spec_plugins.kernels.selection import digit_for

NUMBERS = "candidates ranks depth parent tokens parents owners start count drafted candidate rows added row found links"
SIGNATURE = {
    **{f"{name}_ptr": "*i64" for name in [*NUMBERS.split(), "out_tokens", "out_parents", "chosen"]},
    **{f"{name}_ptr": "*fp32" for name in ("chance", "out", "chances", "scores", "out_chance")},
    **dict.fromkeys(("count", "deepest", "per_depth", "nodes", "limit", "candidates", "width", "most"), "i32"),
    **dict.fromkeys(("children", "considered"), "i32"),
    "least_bits": "i64",
    "least": "fp32",
}


def fits(usage: Usage) -> bool:
    return usage.spills == 0 and usage.shared < 99 << 10


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("paths", "nodes", "warps"), [(256, 16, 4), (growth.MOST_PATHS, 128, 16)])
def test_the_paths_of_heads_fit_in_registers(paths: int, nodes: int, warps: int, capability: int) -> None:
    blocks = {"FIXED": False, "BLOCK_C": paths, "BLOCK_N": nodes, "DIGIT": digit_for(paths, warps)}
    assert fits(compile_for(growth._ranked_kernel, SIGNATURE, blocks, capability, warps, 1))
    fixed = {**blocks, "FIXED": True}
    assert fits(compile_for(growth._ranked_kernel, SIGNATURE, fixed, capability, warps, 1))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("candidates", "rows", "nodes"), [(128, 4, 32), (1024, 32, 128)])
def test_the_candidates_of_a_draft_fit_in_registers(candidates: int, rows: int, nodes: int, capability: int) -> None:
    warps = max(1, min(4, candidates // 256))
    assert fits(compile_for(growth._expand_kernel, SIGNATURE, {"BLOCK_C": candidates}, capability, warps, 1))
    level = {"BLOCK_M": rows, "BLOCK_K": 8}
    assert fits(compile_for(growth._adopt_kernel, SIGNATURE, level, capability, 1, 1))
    blocks = {"BLOCK_C": candidates, "BLOCK_J": 8, "BLOCK_N": nodes}
    warps = max(1, min(8, candidates // 32))
    assert fits(compile_for(growth._likeliest_kernel, SIGNATURE, blocks, capability, warps, 1))


def test_what_is_one_at_run_time_is_compiled_as_a_constant() -> None:
    heads = {"count": 1, "deepest": 1, "per_depth": 1, "nodes": 1, "BLOCK_C": 1, "BLOCK_N": 1, "DIGIT": 7}
    for fixed in (False, True):
        assert fits(compile_for(growth._ranked_kernel, SIGNATURE, {**heads, "FIXED": fixed}, 90, 1, 1))
    expand = {"candidates": 1, "width": 1, "most": 1, "BLOCK_C": 1}
    assert fits(compile_for(growth._expand_kernel, SIGNATURE, expand, 90, 1, 1))
    adopt = {"most": 1, "children": 1, "considered": 1, "width": 1, "candidates": 1, "BLOCK_M": 1, "BLOCK_K": 1}
    assert fits(compile_for(growth._adopt_kernel, SIGNATURE, adopt, 90, 1, 1))
    likeliest = {"candidates": 1, "nodes": 1, "BLOCK_C": 1, "BLOCK_J": 1, "BLOCK_N": 1}
    assert fits(compile_for(growth._likeliest_kernel, SIGNATURE, likeliest, 90, 1, 1))
