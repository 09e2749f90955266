# SPDX-License-Identifier: Apache-2.0
"""Kernels are compiled at their first launch for what they are launched with: an engine launches all of that at its start."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.kernels.test_cases import HERE
from vllm_spec_plugins import compiled
from vllm_spec_plugins.cpu import interpreted
from vllm_spec_plugins.kernels import calibration, history, ngram_pool, ranks, tree_walk
from vllm_spec_plugins.tree.calibration import Calibration
from vllm_spec_plugins.tree.ranks import Ranks

MODELS = HERE.parent / "models"
FULL = {"min_chance": 0.0, "adapt": False}
LOOKAHEAD = {"name": "lookahead", "ngram": 3, "guesses": 2, "nodes": 4, "draft_length": 4, **FULL}
POOL, WINDOW = {**LOOKAHEAD, "shared_pool": True}, {**LOOKAHEAD, "window": 3, "accept": "typical"}
MEDUSA = {"name": "medusa", "model": str(MODELS / "medusa"), "nodes": 5, "depth": 2, "ranks": 3, **FULL}
SPECINFER = {"name": "specinfer", "model": str(MODELS / "draft"), "nodes": 6, "depth": 3, "ranks": 3, **FULL}


def program_of(kernel: Any, args: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a program for, and takes another one if it differs."""
    parameters = inspect.signature(kernel.fn).parameters
    values = {**dict(zip(parameters, args, strict=False)), **given}
    found: list[Any] = [kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__]
    for name, value in values.items():
        fixed = name not in parameters or "constexpr" in str(parameters[name].annotation)
        if isinstance(value, torch.Tensor):
            found.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif fixed or value is None:
            found.append((name, value))
        elif isinstance(value, int):
            free = name in (kernel.kwargs["do_not_specialize"] or ())
            found.append((name, value.bit_length() > 31, free or (value == 1, value % 16 == 0)))
        else:
            found.append((name, type(value)))
    return tuple(found)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """The programs of this package that were launched."""
    programs: set[tuple[Any, ...]] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: Any, **given: Any) -> Any:
        if self.fn.__module__.startswith("vllm_spec_plugins.kernels."):
            programs.add(program_of(self, args, given))
        return run(self, *args, grid=grid, warmup=warmup, **given)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return programs


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Engines in this process, where what a GPU would run as this package's kernels is interpreted."""
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setitem(os.environ, name, value)
    interpreted.enable()
    monkeypatch.setattr(compiled, "use_kernels", True)

    def make(*plugins: dict[str, Any]) -> Any:
        from vllm import LLM

        import vllm_spec_plugins
        from vllm_spec_plugins.engine.triton_attention import TritonTreeImpl

        # Almost all of the time, and what a text says does not matter here: rows attend to nothing.
        monkeypatch.setattr(TritonTreeImpl, "forward", lambda *_, output, **__: output.zero_())
        monkeypatch.setattr(TritonTreeImpl, "do_kv_cache_update", lambda *_, **__: None)

        return LLM(
            str(MODELS / "target"), **vllm_spec_plugins.engine_args(*plugins), dtype="float32", enforce_eager=True,
            max_model_len=96, max_num_seqs=4, kv_cache_memory_bytes=1 << 24,
        )  # fmt: skip

    return make


PLUGINS = {
    "a mixture": (
        (POOL, MEDUSA, SPECINFER),
        "history trie ngram_pool ranks calibration union growth coupled_topk tree_walk kv_commit tree_attention",
    ),
    "a window and a lossy rule": ((WINDOW,), "history trie ngram_pool window tree_walk kv_commit tree_attention"),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_no_kernel_is_compiled_for_a_request(
    name: str, engine: Callable[..., Any], launched: set[tuple[Any, ...]]
) -> None:
    from vllm import SamplingParams

    plugins, expected = PLUGINS[name]
    llm = engine(*plugins)
    start = set(launched)
    assert {module for module, *_ in start} == set(expected.split())
    for together in (1, 3):
        prompts = [{"prompt_token_ids": [5, 6 + i, 7, 5, 6 + i, 7, 5]} for i in range(together)]
        sampling = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=4) for i in range(together)]
        llm.generate(prompts, sampling, use_tqdm=False)
    for program in sorted(launched - start, key=str):
        known = [other for other in start if other[:2] == program[:2]]
        print(*program[:2], "differs from those of the start in", *(set(program) - set(other) for other in known))
    assert not launched - start


def launch_each(batch: int, length: int, depth: int, rng: torch.Generator) -> None:
    """Kernels whose arguments go with the batch or with the length of the texts."""
    slots, one = torch.arange(batch), torch.ones(batch, dtype=torch.int64)
    texts = torch.randint(3, (40, 900), generator=rng, dtype=torch.int32)
    state = Ranks(40, depth, 2, torch.device("cpu"))
    ranks.judge(state.offered, state.offered_at, state.hits, state.seen, slots, texts, one * length, one, 0.5)
    offered = Calibration(40, (2, 3), depth, torch.device("cpu"))
    forest = offered.tokens, offered.parents, offered.odds, offered.source, offered.offered_at, offered.counts
    calibration.observe(slots, texts, one * length, one, *forest, depth, 0.5)
    history.history_guesses(texts, slots, one * length, length, 2, 3, 3, torch.ones(2, 5))
    ngrams = torch.randint(9, (1, batch, 3), generator=rng)
    entries = torch.full((1, 9, 2, 3), -1, dtype=torch.int32)
    ngram_pool.insert(entries, one[:1] - 1, ngrams, torch.ones(1, batch, dtype=torch.bool))
    tokens = torch.zeros(batch, depth, dtype=torch.int64)
    tree_walk.tree_walk(tokens, tokens, torch.zeros(batch, 99, dtype=torch.int64)[:, : depth + 1], depth)


def test_neither_the_batch_nor_the_length_of_the_texts_makes_another_program(
    rng: torch.Generator, launched: set[tuple[Any, ...]]
) -> None:
    launch_each(1, 5, 2, rng)
    first = set(launched)
    assert len(first) == 8
    for batch, length in ((2, 700), (16, 16), (33, 890)):
        launch_each(batch, length, 2, rng)
    assert launched == first
    launch_each(1, 5, 3, rng)  # the control: what is one for an engine does
    assert {name for _, name, *_ in launched - first} == {"_judge_kernel", "tree_walk_kernel"}
