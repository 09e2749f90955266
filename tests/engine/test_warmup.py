# SPDX-License-Identifier: Apache-2.0
"""What vLLM runs at the start on a GPU, before graphs are captured: steps with drafts that no proposer made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.decoding import SAMPLINGS, generate

# Full trees: synchronous scheduling, all that a CPU has by default, gives absent nodes no row, and the warm-up does.
PLUGIN = f"specinfer:model={MODELS / 'draft'},min_chance=0,adapt=false"


def test_vllms_warmup_of_a_gpu_runs_and_leaves_nothing_behind(
    engine: Callable[..., Any], prompts: list[list[int]]
) -> None:
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    sampling = [SAMPLINGS["mixed"](i) for i in range(4)]
    expected, _ = generate(engine(vllm_spec_plugins.engine_args("none")), prompts[:4], sampling)
    llm = engine(vllm_spec_plugins.engine_args(PLUGIN))
    worker = llm.llm_engine.model_executor.driver_worker.worker
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    assert generate(llm, prompts[:4], sampling)[0] == expected
