# SPDX-License-Identifier: Apache-2.0
"""Engines on a GPU: the text of plain vLLM, eager and replayed from CUDA graphs, and no waiting for the device in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.engine.decoding import SAMPLINGS, generate
from tests.gpu.conftest import MODELS
from tests.no_sync import no_sync

# Thresholds and adaptation are for speed: without them trees are full, and branch.
PLUGINS = {
    "lookahead": "lookahead",
    "medusa": f"medusa:model={MODELS / 'medusa'},min_chance=0,adapt=false",
    "specinfer": f"specinfer:model={MODELS / 'draft'},min_chance=0,adapt=false",
}
# Without torch.compile, whose float32 sums have another order, and as vLLM serves by default.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "default": {},
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whose full CUDA graph is replayed, every time."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    seen: list[Any] = []
    run = CudaGraphManager.run_fullgraph

    def spied(self: Any, desc: Any) -> Any:
        seen.append(self)
        return run(self, desc)

    monkeypatch.setattr(CudaGraphManager, "run_fullgraph", spied)
    return seen


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, mode) for mode in ("eager", "full graphs") for name in PLUGINS), ("lookahead", "default")],
)
def test_text_is_plain_vllms(
    name: str, mode: str, engine: Callable[..., Any], prompts: list[list[int]], replays: list[Any]
) -> None:
    from vllm_spec_plugins.engine.draft_graphs import DraftGraphs

    plain, plugin = engine(**MODES[mode]), engine(PLUGINS[name], **MODES[mode])
    for kind in ("greedy", "sampled", "mixed"):
        sampling = [SAMPLINGS[kind](i) for i in range(12)]
        expected, _ = generate(plain, prompts[:12], sampling)
        replays.clear()
        found, _ = generate(plugin, prompts[:12], sampling)
        assert found == expected, kind
        assert bool(replays) == (mode != "eager")
        drafted = any(isinstance(each, DraftGraphs) for each in replays)
        assert drafted == (name == "specinfer" and mode != "eager")
    found, speed = generate(plugin, prompts[:1], [SAMPLINGS["greedy"](0)])
    assert found == generate(plain, prompts[:1], [SAMPLINGS["greedy"](0)])[0]
    assert speed > 1.2  # else nothing was accepted, and nothing was shown


@pytest.mark.parametrize("mode", ["eager", "full graphs"])
@pytest.mark.parametrize("name", ["medusa", "specinfer"])
def test_text_from_8_bit_caches_is_that_of_none_with_such_caches(
    name: str, mode: str, engine: Callable[..., Any], prompts: list[list[int]]
) -> None:
    settings = {**MODES[mode], "kv_cache_dtype": "fp8"}
    plain, plugin = engine("none", **settings), engine(PLUGINS[name], **settings)
    for llm in (plain, plugin):
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert all(layer.kv_cache.element_size() == 1 and layer.query_quant is None for layer in layers)
    for kind in ("greedy", "sampled", "mixed"):
        sampling = [SAMPLINGS[kind](i) for i in range(12)]
        assert generate(plugin, prompts[:12], sampling)[0] == generate(plain, prompts[:12], sampling)[0], kind
    assert generate(plugin, prompts[:1], [SAMPLINGS["greedy"](0)])[1] > 1.2  # else nothing was accepted


def test_every_layer_runs_tree_attention_on_the_gpu(engine: Callable[..., Any]) -> None:
    from vllm_spec_plugins.engine.triton_attention import TritonTreeImpl

    llm = engine(PLUGINS["lookahead"], **MODES["eager"])
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert layers and all(isinstance(layer.impl, TritonTreeImpl) for layer in layers.values())
    assert all(layer.kv_cache.is_cuda for layer in layers.values())


@pytest.mark.parametrize(("name", "mode"), [*((name, "eager") for name in PLUGINS), ("specinfer", "full graphs")])
def test_no_stage_of_the_step_waits_for_the_gpu(
    name: str, mode: str, engine: Callable[..., Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our calls, with all that they call: what was launched there must not be waited for."""
    llm = engine(PLUGINS[name], **MODES[mode])
    sampling = [SAMPLINGS[("greedy", "sampled")[i % 2]](i) for i in range(8)]
    expected, _ = generate(llm, prompts[:8], sampling)  # compiles what is compiled at first use
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    stages = [
        (runner.model_state, "preprocess_state"),
        (runner.model_state, "prepare_attn"),
        (runner.model_state, "prepare_inputs"),
        (runner.model_state, "postprocess_state"),
        (runner.speculator, "propose"),
        (runner, "rejection_sampler"),
    ]
    called: set[str] = set()

    def watched(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            called.add(stage)
            with no_sync(torch.device("cuda")):
                return function(*args, **kwargs)

        return run

    for owner, stage in stages:
        monkeypatch.setattr(owner, stage, watched(stage, getattr(owner, stage)))
    assert generate(llm, prompts[:8], sampling)[0] == expected
    assert called == {stage for _, stage in stages}


def test_waiting_is_seen() -> None:
    """The control."""
    x = torch.ones(4, device="cuda")
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(RuntimeError, match="synchron"))
        stack.enter_context(no_sync(torch.device("cuda")))
        x.sum().item()
    assert x.sum().item() == 4
