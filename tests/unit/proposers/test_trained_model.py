# SPDX-License-Identifier: Apache-2.0
"""Lookahead on the trained model of this repository: the same text in fewer passes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.unit.proposers.model_target import ModelTarget
from tests.unit.proposers.simulate import simulate
from vllm_spec_plugins.proposers.lookahead import LookaheadProposer

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def texts():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    with open(MODELS / "heldout_prompts.jsonl") as lines:
        found = [json.loads(next(lines))["prompt"] for _ in range(3)]
    return [tokenizer(prompt).input_ids for prompt in found]


@pytest.mark.parametrize(
    ("temperature", "settings", "at_least"),
    [
        (0.0, {"window": 0, "nodes": 16, "draft_length": 16}, 1.2),
        (0.8, {"window": 0, "nodes": 16, "draft_length": 16}, 1.0),
        (0.8, {"window": 5, "ngram": 2, "nodes": 16, "draft_length": 16}, 1.1),
        (0.0, {"window": 4, "ngram": 3, "nodes": 16, "prompt_pool": False}, 1.05),
    ],
    ids=str,
)
def test_a_trained_models_text_is_plain_decodings_in_fewer_passes(temperature, settings, at_least, texts):
    target = ModelTarget(MODELS / "target", temperature)
    proposer = LookaheadProposer(max_requests=2, **settings)
    rng = torch.Generator().manual_seed(0)
    outcome = simulate(proposer, target, texts, max_new=32, slots=2, rng=rng, vocab=4096)
    for request, text in enumerate(texts):
        assert outcome.outputs[request] == target.plain(request, text, 32)
    print(outcome.tokens_per_step, outcome.nodes_per_step)
    assert outcome.tokens_per_step > at_least
