# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import trie
from vllm_spec_plugins.kernels.selection import digit_for

SIGNATURE = {
    "ngrams_ptr": "*i64",
    "odds_ptr": "*fp32",
    "tokens_ptr": "*i64",
    "parents_ptr": "*i64",
    "chance_ptr": "*fp64",
    "count": "i32",
    "length": "i32",
    "nodes": "i32",
    "limit": "i32",
    "least_bits": "i64",
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("count", "length", "nodes", "warps"), [(1, 16, 16, 1), (32, 16, 64, 8), (32, 64, 128, 8)])
def test_the_ngrams_fit_in_registers(count: int, length: int, nodes: int, warps: int, capability: int) -> None:
    blocks = {"BLOCK_G": count, "BLOCK_L": length, "BLOCK_N": nodes, "DIGIT": digit_for(count * length, warps)}
    usage = compile_for(trie._trie_kernel, SIGNATURE, blocks, capability, warps, 1)
    assert usage.spills == 0
    assert usage.shared < 99 << 10


def test_what_is_one_at_run_time_is_compiled_as_a_constant() -> None:
    ones = {"count": 1, "length": 1, "nodes": 1}
    blocks = {"BLOCK_G": 1, "BLOCK_L": 1, "BLOCK_N": 1, "DIGIT": 7}
    assert compile_for(trie._trie_kernel, SIGNATURE, {**ones, **blocks}, 90, 1, 1).spills == 0
