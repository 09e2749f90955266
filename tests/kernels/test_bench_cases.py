# SPDX-License-Identifier: Apache-2.0
"""The cases of `bench kernels`, small: their checks pass, and fail when the kernel or the reference is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vllm_spec_plugins import kernels
from vllm_spec_plugins.tools import kernel_cases as cases
from vllm_spec_plugins.tools.kernel_cases import Case, Mismatch
from vllm_spec_plugins.tree.topology import Topology

SMALL: dict[str, Callable[[], Case]] = {
    "tree_walk": lambda: cases.tree_walk("cpu", batch=3, topology=Topology((0, 0, 1, 2, 3), (0, 1, 0, 0, 0))),
    "coupled_topk": lambda: cases.coupled_topk("cpu", rows=3, vocabulary=1500),
    "kv_commit": lambda: cases.kv_commit(
        "cpu", batch=2, layers=2, groups=2, dim=4, page=4, context=6, rows=9, moved=3, dtype=torch.float16
    ),
    "pool_lookup": lambda: cases.pool_lookup("cpu", batch=2, guesses=3, ngram=3, buckets=8),
    "pool_insert": lambda: cases.pool_insert("cpu", batch=2, guesses=3, ngram=3, buckets=8),
    "history": lambda: cases.history("cpu", batch=2, context=90, guesses=2, length=5),
    "trie": lambda: cases.trie("cpu", batch=2, guesses=3, length=4, nodes=8),
    "growth": lambda: cases.growth("cpu", batch=2, depth=2, ranks=3, nodes=6),
    "union": lambda: cases.union("cpu", batch=2, each=5, nodes=6),
    "ranks": lambda: cases.ranks("cpu", batch=2, depth=2, per_depth=3),
    "calibration": lambda: cases.calibration("cpu", batch=2),
    "window": lambda: cases.window("cpu", batch=2, width=3, ngram=3),
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    """What a kernel stands beside there is torch code, not the loops of the CPU."""
    with cases.in_torch():
        yield


@pytest.mark.parametrize("name", SMALL)
def test_the_check_passes_and_everything_can_be_launched(name: str) -> None:
    case = SMALL[name]()
    case.check(case.launch)
    case.launch()
    for launch in case.beside.values():
        launch()
    case.check(case.launch)


@pytest.mark.parametrize("name", SMALL)
def test_the_check_fails_when_a_launch_writes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control. What a launch before has left in the outputs must not pass for this one's result."""
    import triton.runtime.interpreter as interpreter

    case = SMALL[name]()
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **given: None)
    with pytest.raises(Mismatch):
        case.check(case.launch)


def test_attention_is_checked_and_stands_beside_vllms_own() -> None:
    from vllm_spec_plugins.cpu import interpreted

    interpreted.enable()
    case = cases.tree_attention(
        "cpu", batch=2, context=20, rows=7, heads=4, groups=2, dim=32, page=16, dtype=torch.float32
    )
    case.check(case.launch)
    mine = case.launch.args[3].view(2, 7, 4, 32)  # type: ignore[attr-defined]
    chain, token = case.beside["vLLM's of a chain as long"], case.beside["vLLM's of one token"]
    token()
    chain()
    theirs = chain.args[3].view(2, 7, 4, 32)  # type: ignore[attr-defined]
    # A row of the tree whose ancestors are all rows before it sees what the chain's row sees: the root and the first node.
    torch.testing.assert_close(mine[:, :2], theirs[:, :2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine[:, 6], theirs[:, 6], rtol=1e-3)


def test_every_kernel_is_measured_and_has_a_small_case_here() -> None:
    assert {"tree_attention", *SMALL} == set(cases.CASES)
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")} - {"__init__", "selection"}
    named = {name.replace("pool_lookup", "ngram_pool").replace("pool_insert", "ngram_pool") for name in cases.CASES}
    assert named == files
