# SPDX-License-Identifier: Apache-2.0
"""What proposers and lossy rules count, on its way from the worker to log and Prometheus."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vllm_spec_plugins
from tests.engine import compare
from tests.engine.conftest import MODELS
from vllm_spec_plugins import registry
from vllm_spec_plugins.engine import activation, metrics
from vllm_spec_plugins.engine.sampler import undrawn
from vllm_spec_plugins.proposers.base import Count
from vllm_spec_plugins.tree import TokenTree, accept_down_to

TOKENS = 64


def figures(llm: Any) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def run(llm: Any, prompts: list[list[int]], temperature: float) -> tuple[int, dict[str, float], list[str]]:
    """Steps, what the counters grew by, and what was logged of it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, scheduler = logging.getLogger("vllm"), llm.llm_engine.engine_core.engine_core.scheduler
    logger.addHandler(handler)
    before, step = figures(llm), scheduler.current_step
    sampling = [{"temperature": temperature, "seed": i} for i in range(len(prompts))]
    compare.generate(llm, prompts, sampling, max_tokens=TOKENS, ignore_eos=True)
    llm.llm_engine.do_log_stats()
    logger.removeHandler(handler)
    grown = {name: value - before.get(name, 0.0) for name, value in figures(llm).items() if "spec_plugin" in name}
    return scheduler.current_step - step, grown, [line for line in lines if line.startswith("Plugin metrics")]


@pytest.mark.parametrize("mode", ["blocks", "parallel"])
def test_jacobi_reports_iterations_and_blocks(mode: str, engine: Callable[..., Any], prompts: list[list[int]]) -> None:
    llm = engine(vllm_spec_plugins.engine_args("jacobi", block=8, mode=mode, adapt=False))
    steps, grown, lines = run(llm, prompts[:1], 0.0)
    # What the last step counted waits for a step to come.
    iterations, blocks = grown["vllm:spec_plugin_jacobi_iterations"], grown["vllm:spec_plugin_jacobi_blocks"]
    assert iterations == steps - 1
    assert TOKENS / 8 - 3 <= blocks <= TOKENS / 8
    logged = [re.search(r"jacobi_iterations: (\d+).* jacobi_blocks: (\d+)", line) for line in lines]
    assert [sum(int(found[n]) for found in logged if found) for n in (1, 2)] == [iterations, blocks]


def test_a_lossy_rule_counts_what_the_target_had_not_drawn(
    engine: Callable[..., Any], prompts: list[list[int]]
) -> None:
    heads = {"model": str(MODELS / "medusa"), "min_chance": 0.0, "adapt": False}
    llm = engine(vllm_spec_plugins.engine_args("medusa", **heads, accept="typical"))
    _, greedy, lines = run(llm, prompts[:4], 0.0)
    assert greedy == {"vllm:spec_plugin_lossy_tokens": 0}
    assert lines == []
    _, sampled, lines = run(llm, prompts[:4], 0.8)
    assert 0 < sampled["vllm:spec_plugin_lossy_tokens"] < 4 * TOKENS
    assert "lossy_tokens: " in lines[0]


def test_an_exact_method_without_counts_has_no_figures_of_its_own(
    engine: Callable[..., Any], prompts: list[list[int]]
) -> None:
    llm = engine(vllm_spec_plugins.engine_args("lookahead"))
    assert run(llm, prompts[:1], 0.0)[1:] == ({}, [])


def test_a_count_is_shown_per_another() -> None:
    log = metrics.CountsLog((Count("steps", "Steps.", per="blocks"), Count("blocks", "Blocks.")))
    log.sums = [9, 4]
    assert log.line() == "steps: 9 (2.25 per blocks), blocks: 4"
    log.sums = [3, 0]
    assert log.line() == "steps: 3, blocks: 0"


def test_accepted_tokens_that_were_not_drawn_are_told_by_the_row_before_them() -> None:
    tree = TokenTree(torch.tensor([[5, 6, 7], [5, 6, 7], [5, -1, -1]]), torch.tensor([[0, 1, 2], [0, 0, 2], [0, 0, 0]]))
    drawn = torch.tensor([[5, 9, 7, 1], [6, 1, 9, 2], [8, 3, -1, -1]])
    # All three with the second not drawn; 6 and 7 below it with 7 not drawn; nothing.
    kept = accept_down_to(tree, torch.tensor([3, 3, 0]), drawn)
    assert int(undrawn(kept, drawn)) == 2


def test_figures_belong_to_the_engine_that_they_were_made_for(engine: Callable[..., Any]) -> None:
    """A younger engine in the process counts other things; the older one's log line stays its own."""
    from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

    engine(vllm_spec_plugins.engine_args("jacobi", block=4))
    older = SpecDecodingLogging()
    engine(vllm_spec_plugins.engine_args("lookahead"))
    stats = SpecDecodingStats.new(4)
    stats.num_draft_tokens_per_pos += [6, 2]
    older.observe(stats)
    assert older._spec_counts.line() == "jacobi_iterations: 6 (3.00 per jacobi_blocks), jacobi_blocks: 2"


def test_the_log_line_outlives_an_engine_of_another_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes one matrix of the accepted tokens per depth of all steps since the last line."""
    from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

    activation.install()
    log, lines = SpecDecodingLogging(), []
    for name in ("lookahead", "jacobi:block=4"):
        monkeypatch.setenv(activation.ACTIVE, json.dumps(registry.resolve(name).as_given()))
        stats = SpecDecodingStats.new(16)
        stats.observe_draft(num_draft_tokens=4, num_accepted_tokens=2)
        log.observe(stats)
    log.log(log_fn=lambda *line: lines.append(line))
    assert len(lines) == 1
