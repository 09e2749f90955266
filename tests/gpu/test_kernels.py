# SPDX-License-Identifier: Apache-2.0
"""Kernels as a GPU runs them, on the shapes of serving. Odd shapes are for tests/kernels, under the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.no_sync import no_sync
from vllm_spec_plugins.tools.kernel_cases import CASES, Mismatch, Setup, in_torch

FULL = [pytest.param(setup, id=f"{kernel}, {setup.shape}") for kernel, setups in CASES.items() for setup in setups]
FIRST = [pytest.param(setups[0], id=kernel) for kernel, setups in CASES.items()]


@pytest.mark.parametrize("setup", FULL)
def test_a_kernel_computes_what_its_reference_does(setup: Setup) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    assert setup.bytes < 0.9 * free, f"needs {setup.bytes / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free"
    case = setup.make("cuda")
    with in_torch():
        case.check(case.launch)


@pytest.mark.parametrize("setup", FIRST)
def test_a_launch_does_not_wait_for_the_gpu(setup: Setup) -> None:
    case = setup.make("cuda")
    case.launch()  # compiles
    with no_sync(torch.device("cuda")):
        case.launch()


@pytest.mark.parametrize("setup", FIRST)
def test_a_launch_can_be_captured_in_a_graph_and_replayed(setup: Setup) -> None:
    case = setup.make("cuda")
    case.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch()
    with in_torch():
        case.check(graph.replay)


def test_a_replayed_graph_reads_the_trees_that_its_buffers_hold_then() -> None:
    from vllm_spec_plugins.tools.kernel_cases import tree_attention

    case = tree_attention("cuda", batch=2, context=300)
    query, _, _, out = case.launch.args  # type: ignore[attr-defined]
    words = case.launch.keywords["words"]  # type: ignore[attr-defined]
    trees = words.clone()
    case.launch()
    expected = out.clone()
    chain = torch.ones(len(query) // 2, len(query) // 2, device="cuda").tril().bool()
    bits = torch.ones(64, dtype=torch.int64, device="cuda") << torch.arange(64, device="cuda")
    words.copy_((chain * bits[: chain.shape[1]]).sum(1, keepdim=True).repeat(2, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch()
    graph.replay()
    assert not torch.equal(out, expected)  # chains
    words.copy_(trees)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the check that the tests above rest on fails when the reference is another."""
    from vllm_spec_plugins.kernels import tree_attention
    from vllm_spec_plugins.tools import kernel_cases

    case = kernel_cases.tree_attention("cuda", batch=2, context=300)
    case.check(case.launch)
    reference = tree_attention.reference

    def other(*args: torch.Tensor, **given: object) -> None:
        reference(*args, **{**given, "words": given["words"] ^ 1})  # type: ignore[arg-type, operator]

    monkeypatch.setattr(tree_attention, "reference", other)
    with pytest.raises(Mismatch):
        case.check(case.launch)
