# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of two engines side by side."""

from __future__ import annotations

from typing import Any

import pytest


def generate(llm: Any, prompts: list[list[int]], sampling: list[dict[str, Any]], **shared: Any) -> list[Any]:
    """One completion per prompt."""
    from vllm import SamplingParams

    params = [SamplingParams(**shared, **each) for each in sampling]
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [result.outputs[0] for result in results]


def assert_same_logprobs(found: Any, expected: Any) -> None:
    """Two completions: the same text, and at each token the same candidates with the same rank and value."""
    assert list(found.token_ids) == list(expected.token_ids)
    assert len(found.logprobs) == len(expected.logprobs) == len(expected.token_ids)
    for token, mine, other in zip(found.token_ids, found.logprobs, expected.logprobs, strict=True):
        assert token in mine
        assert mine.keys() == other.keys()
        for each in mine:
            assert mine[each].logprob == pytest.approx(other[each].logprob, abs=1e-4)
            assert mine[each].rank == other[each].rank
    assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
