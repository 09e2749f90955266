# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.unit.kernels.aot import SHARED_LIMIT, compile_for
from vllm_spec_plugins.kernels.kv_commit import TILE_ELEMENTS, TILE_NODES, kv_commit_kernel

SIGNATURE = {
    "caches_ptr": "*i64",
    "block_table_ptr": "*i32",
    "block_table_row_stride": "i32",
    "root_ptr": "*i64",
    "path_ptr": "*i64",
    "path_row_stride": "i32",
    "num_accepted_ptr": "*i64",
    "slots_ptr": "*i32",
    "block_stride": "i32",
    "head_stride": "i32",
    "slot_stride": "i32",
    "num_elements": "i32",
    "max_depth": "i32",
}
STRIDES = ("block_stride", "head_stride", "slot_stride", "num_elements")
CONSTANTS = {
    "HAS_SLOTS": True,
    "HEAD_SIZE": 128,  # D = 128 in bfloat16, keys and values
    "BLOCK_SIZE": 16,
    "UNIT": 4,
    "ALIGNED": True,
    "BLOCK_DEPTH": 8,
    "TILE_NODES": TILE_NODES,
    "TILE_ELEMENTS": TILE_ELEMENTS,
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "other", [{}, {"UNIT": 1, "ALIGNED": False, "HEAD_SIZE": 7}, {"HAS_SLOTS": False, "slots_ptr": None, "UNIT": 2}]
)
def test_compiles_without_spilling(capability: int, other: dict[str, object]) -> None:
    aligned = STRIDES if CONSTANTS["ALIGNED"] else ()
    usage = compile_for(
        kv_commit_kernel, SIGNATURE, CONSTANTS | other, capability, num_warps=4, num_stages=1, aligned=aligned
    )
    assert usage.spills == 0, usage
    assert usage.shared <= SHARED_LIMIT[89], usage


def test_a_tile_is_read_in_wide_words_before_the_barrier_and_written_behind_it() -> None:
    names = kv_commit_kernel.arg_names
    types = {name: "constexpr" if name in CONSTANTS else SIGNATURE[name] for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in STRIDES}
    source = ASTSource(kv_commit_kernel, types, {(names.index(k),): v for k, v in CONSTANTS.items()}, divisible)
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    content = TILE_NODES * TILE_ELEMENTS // 128  # 32-bit words of each of 128 threads
    order = re.findall(r"(ld|st)\.global\.v4\.b32|(bar)\.sync", ptx)
    marks = ["".join(each) for each in order]
    at = marks.index("st")
    assert marks.count("ld") == marks.count("st") == content // 4
    assert marks[at - 1] == "bar" and "ld" not in marks[at:] and "st" not in marks[:at]
