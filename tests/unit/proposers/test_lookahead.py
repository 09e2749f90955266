# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.proposers.simulate import MarkovTarget, from_next_token, plain, simulate
from vllm_spec_plugins.proposers.lookahead import LookaheadProposer

SETTINGS = [
    {"window": 0, "guesses": 1, "nodes": 4},
    {"window": 0, "guesses": 7, "nodes": 16, "draft_length": 12},
    {"window": 0, "guesses": 5, "nodes": 30, "draft_length": 8, "min_chance": 0.0},
    {"window": 1, "ngram": 3, "guesses": 2},
    {"window": 5, "ngram": 2, "guesses": 3},
    {"window": 7, "ngram": 5, "guesses": 7, "nodes": 12},
    {"window": 4, "ngram": 4, "guesses": 4, "prompt_pool": False},
    {"window": 4, "ngram": 4, "guesses": 4, "shared_pool": True, "pool_buckets": 16},
    {"window": 0, "ngram": 4, "guesses": 4, "prompt_pool": False, "shared_pool": True},
]


def prompts(rng, count, vocab, longest=30):
    return [
        torch.randint(vocab, (int(torch.randint(1, longest, (1,), generator=rng)),), generator=rng).tolist()
        for _ in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_text_is_that_of_plain_decoding(settings, temperature, rng):
    """Several requests, slots reused, prompts in chunks, trees cut, steps sat out, budgets that come and go."""
    vocab, eos = 14, 3
    seed = int(torch.randint(1 << 20, (1,), generator=rng))
    model = MarkovTarget(vocab, 2, temperature, seed)
    texts = prompts(rng, 9, vocab)
    proposer = LookaheadProposer(max_requests=4, eos_token_ids=[eos], **settings)
    outcome = simulate(
        proposer,
        from_next_token(model),
        texts,
        max_new=60,
        slots=4,
        rng=rng,
        eos=eos,
        chunks=2,
        skip=0.1,
        cut=0.15,
        budget=lambda: None if torch.rand(1, generator=rng) < 0.7 else int(torch.randint(20, (1,), generator=rng)),
        vocab=vocab,
    )
    for request, text in enumerate(texts):
        assert outcome.outputs[request] == plain(model, request, text, 60, eos)
    print(settings, temperature, outcome.tokens_per_step, outcome.nodes_per_step)
