# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import sys
from collections import Counter
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.unit.kernels.aot import SHARED_LIMIT, compile_for
from vllm_spec_plugins.kernels.coupled_topk import BLOCK_VOCAB, block_topk_kernel, merge_topk_kernel

SIGNATURE = {
    "logits_row_stride": "i32",
    "temperature_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "position_ptr": "*i64",
    "rows_ptr": "*i32",
    "partial_ptr": "*i64",
    "vocab_size": "i32",
    "tokens_ptr": "*i64",
    "scores_ptr": "*fp32",
    "num_partial": "i32",
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "scaled", "count"), [("fp32", True, 16), ("bf16", False, 3)])
def test_a_block_of_the_vocabulary_compiles_without_spilling(
    capability: int, dtype: str, scaled: bool, count: int
) -> None:
    constexprs: dict[str, Any] = {"HAS_ROWS": scaled, "SCALED": scaled, "COUPLED": True, "COUNT": count}
    constexprs |= {"BLOCK_VOCAB": BLOCK_VOCAB} | ({} if scaled else {"rows_ptr": None})
    signature = SIGNATURE | {"logits_ptr": f"*{dtype}"}
    usage = compile_for(block_topk_kernel, signature, constexprs, capability, num_warps=4, num_stages=3)
    assert usage.spills == 0, usage
    assert usage.shared <= SHARED_LIMIT[89], usage


@pytest.mark.parametrize("capability", [80, 90])
def test_the_merge_of_a_quarter_of_a_million_tokens_compiles_without_spilling(capability: int) -> None:
    constexprs = {"COUNT": 16, "HAS_ROWS": True, "BLOCK_PARTIAL": 4096}
    usage = compile_for(merge_topk_kernel, SIGNATURE, constexprs, capability, num_warps=4, num_stages=3)
    assert usage.spills == 0, usage
    assert usage.shared <= SHARED_LIMIT[89], usage


def roundings(kernel: Any, types: dict[str, str], values: dict[str, Any]) -> Counter[tuple[str, ...]]:
    """The float32 operations of a kernel's PTX that round, each with its constants; signs, which never round, left out."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in values else types[name] for name in names},
        {(names.index(name),): value for name, value in values.items()},
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = re.findall(r"^\s*((?:add|sub|mul|fma|div|max|lg2|ex2|rcp|cvt\.rn)\S*\.f32\S*)\s(.*);", ptx, re.MULTILINE)
    bits = [[int(each, 16) & 0x7FFFFFFF for each in re.findall(r"0f([0-9A-F]{8})", operands)] for _, operands in found]
    return Counter((name, *map(hex, constants)) for (name, _), constants in zip(found, bits, strict=True))


def test_a_gpu_rounds_the_sums_as_it_rounds_those_of_vllms_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal noise under the interpreter says nothing of what a compiler fuses: same operations, so the same sums."""
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", SimpleNamespace(tl=tl, triton=triton))
    package = find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "v1/worker/gpu/sample/gumbel.py")
    spec = spec_from_file_location("vllm_gumbel_kernels", file)
    assert spec is not None and spec.loader is not None
    gumbel = module_from_spec(spec)
    spec.loader.exec_module(gumbel)

    unused = {name: None for name in gumbel._gumbel_sample_kernel.arg_names if "logits_cache" in name}
    values = {
        "BLOCK_SIZE": 128,
        "IS_DRAFTING": False,
        "APPLY_TEMPERATURE": True,
        "USE_FP64": False,
        "PER_TOKEN_COL": False,
    }
    types = SIGNATURE | {"local_argmax_ptr": "*i64", "local_argmax_stride": "i32", "local_max_stride": "i32"}
    types |= {"local_max_ptr": "*fp32", "expanded_idx_mapping_ptr": "*i32", "temp_ptr": "*fp32", "pos_ptr": "*i64"}
    types |= {"logits_ptr": "*fp32", "logits_stride": "i32"}
    theirs = roundings(gumbel._gumbel_sample_kernel, types, unused | values)
    ours = {"COUNT": 1, "HAS_ROWS": True, "SCALED": False, "COUPLED": True, "BLOCK_VOCAB": 128}
    assert roundings(block_topk_kernel, types, ours) == theirs
    assert sum(theirs.values()) > 20
    # A control: without the temperature one operation is missing.
    assert roundings(block_topk_kernel, types, ours | {"SCALED": True}) != theirs
