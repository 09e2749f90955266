# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import ngram_pool

SIGNATURE = {
    "entries_ptr": "*i32",
    "rows_ptr": "*i64",
    "key_ptr": "*i64",
    "found_ptr": "*i64",
    "ngrams_ptr": "*i64",
    "valid_ptr": "*u8",
    "buckets": "i32",
    "ways": "i32",
    "ngram": "i32",
    "many": "i32",
}


@pytest.mark.parametrize("capability", [80, 90])
def test_a_pool_fits_in_the_registers_of_a_warp(capability: int) -> None:
    lookup = compile_for(ngram_pool._lookup_kernel, SIGNATURE, {"WAYS": 32, "NGRAM": 16}, capability, 1, 1)
    blocks = {"AT_ONCE": ngram_pool.AT_ONCE, "WAYS": 32, "NGRAM": 16}
    insert = compile_for(ngram_pool._insert_kernel, SIGNATURE, blocks, capability, 1, 1)
    for usage in (lookup, insert):
        assert usage.spills == 0
        assert usage.shared < 99 << 10


def test_what_is_one_at_run_time_is_compiled_as_a_constant() -> None:
    ones = {"buckets": 1, "ways": 1}
    lookup = {**ones, "WAYS": 1, "NGRAM": 2}
    assert compile_for(ngram_pool._lookup_kernel, SIGNATURE, lookup, 90, 1, 1).spills == 0
    insert = {**ones, "AT_ONCE": ngram_pool.AT_ONCE, "WAYS": 1, "NGRAM": 2}
    assert compile_for(ngram_pool._insert_kernel, SIGNATURE, insert, 90, 1, 1).spills == 0
