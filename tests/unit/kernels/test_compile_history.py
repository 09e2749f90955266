# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.unit.kernels.aot import compile_for
from vllm_spec_plugins.kernels import history

SIGNATURE = {
    "token_ids_ptr": "*i32",
    "slots_ptr": "*i64",
    "lengths_ptr": "*i64",
    "places_ptr": "*i32",
    "odds_of_ptr": "*fp32",
    "ngrams_ptr": "*i64",
    "odds_ptr": "*fp32",
    **dict.fromkeys(("row_stride", "span", "guesses", "length", "longest", "found"), "i32"),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("block", "found", "guesses", "length", "warps"), [(512, 1, 1, 16, 1), (2048, 2048, 32, 64, 4)]
)
def test_a_text_s_places_fit_in_registers(
    block: int, found: int, guesses: int, length: int, warps: int, capability: int
) -> None:
    search = compile_for(history._search_kernel, SIGNATURE, {"SEARCHED": 3, "BLOCK_SIZE": block}, capability, 4, 1)
    blocks = {"FOUND": found, "BLOCK_G": guesses, "BLOCK_L": length, "LONGEST": 16}
    guess = compile_for(history._guess_kernel, SIGNATURE, blocks, capability, warps, 1)
    for usage in (search, guess):
        assert usage.spills == 0
        assert usage.shared < 99 << 10


def test_what_is_one_at_run_time_is_compiled_as_a_constant() -> None:
    ones = {"guesses": 1, "length": 1}
    search = {"SEARCHED": 3, "BLOCK_SIZE": 512, "guesses": 1}
    assert compile_for(history._search_kernel, SIGNATURE, search, 90, 4, 1).spills == 0
    guess = {**ones, "FOUND": 1, "BLOCK_G": 1, "BLOCK_L": 1, "LONGEST": 16}
    assert compile_for(history._guess_kernel, SIGNATURE, guess, 90, 1, 1).spills == 0
