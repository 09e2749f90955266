# SPDX-License-Identifier: Apache-2.0
"""Two plugins on one engine beside plain decoding: the same text, and no fewer tokens per step than the better alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vllm_spec_plugins
from tests.engine.conftest import MODELS
from tests.engine.decoding import SAMPLINGS, generate
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.proposers.mixture import MixtureProposer

# Full trees: the chance threshold and the governor are for speed.
LOOKAHEAD = {"name": "lookahead", "guesses": 4, "min_chance": 0.0, "adapt": False}
MEDUSA = {"name": "medusa", "model": str(MODELS / "medusa"), "min_chance": 0.0, "adapt": False}
ALONE = 6  # prompts that are also served one at a time


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


@pytest.fixture(scope="module")
def engines(engine: Callable[..., Any], plain: Any) -> dict[str, Any]:
    return {
        "lookahead": engine(vllm_spec_plugins.engine_args(LOOKAHEAD)),
        "medusa": engine(vllm_spec_plugins.engine_args(MEDUSA)),
        "both": engine(vllm_spec_plugins.engine_args(LOOKAHEAD, MEDUSA)),
    }


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_text_is_plain_decodings_and_steps_are_no_more_than_the_better_sources(
    name: str, plain: Any, engines: dict[str, Any], prompts: list[list[int]]
) -> None:
    sampling = [SAMPLINGS[name](i) for i in range(12)]
    expected, _ = generate(plain, prompts[:12], sampling)
    found, _ = generate(engines["both"], prompts[:12], sampling)
    assert found == expected
    speed = {}
    for source, llm in engines.items():
        steps = 0.0
        for prompt, each, text in list(zip(prompts, sampling, expected, strict=False))[:ALONE]:
            found, tokens_per_step = generate(llm, [prompt], [each])
            assert found == [text]
            steps += 1.0 / tokens_per_step
        speed[source] = ALONE / steps
    print(name, speed)
    assert speed["both"] >= 0.97 * max(speed["lookahead"], speed["medusa"])


def test_the_engine_runs_both_proposers(engines: dict[str, Any]) -> None:
    runner = engines["both"].llm_engine.model_executor.driver_worker.worker.model_runner
    mixture = runner.speculator.proposer
    assert isinstance(mixture, MixtureProposer)
    assert [source.name for source in mixture.sources] == ["lookahead", "medusa"]
    assert mixture.num_nodes == 16
    places, _, right = mixture.calibration.counts[-1].unbind(1)
    assert (places > 0).all() and (right > 0).all()


@pytest.mark.cpu_lane("loops are compiled there only")
def test_what_the_mixture_compiled_at_the_start_is_all_that_serving_needs(engines: dict[str, Any]) -> None:
    from vllm_spec_plugins.tree import union_loops

    for loop in (union_loops.forest_odds, union_loops.union, union_loops.observe, union_loops.factors):
        assert len(loop.signatures) == 1, loop.signatures


def test_heads_in_a_mixture_are_checked_before_the_engine_starts(engine: Callable[..., Any]) -> None:
    with pytest.raises(SettingError, match="no/such/folder is neither a folder nor a hub id"):
        engine(vllm_spec_plugins.engine_args("lookahead", {"name": "medusa", "model": "no/such/folder"}))
    with pytest.raises(SettingError, match=r"^--plugin lookahead --plugin medusa: conflicts with --speculative-config"):
        engine(
            vllm_spec_plugins.engine_args(LOOKAHEAD, MEDUSA),
            speculative_config={"method": "ngram", "num_speculative_tokens": 4},
        )
