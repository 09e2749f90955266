# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.proposers.simulate import MarkovTarget, from_next_token, plain, simulate
from vllm_spec_plugins.proposers.base import least_chance
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


def hostile(proposer, model, texts, rng, eos):
    """Several requests, slots reused, prompts in chunks, trees cut, steps sat out, budgets that come and go."""
    return simulate(
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
        vocab=model.vocab,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_text_is_that_of_plain_decoding(settings, temperature, rng):
    eos = 3
    model = MarkovTarget(14, 2, temperature, int(torch.randint(1 << 20, (1,), generator=rng)))
    texts = prompts(rng, 9, 14)
    proposer = LookaheadProposer(max_requests=4, eos_token_ids=[eos], **settings)
    outcome = hostile(proposer, model, texts, rng, eos)
    for request, text in enumerate(texts):
        assert outcome.outputs[request] == plain(model, request, text, 60, eos)


def test_the_text_is_that_of_plain_decoding_for_random_settings(rng):
    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=rng))]

    for _ in range(15):
        settings = {
            "window": pick(0, 1, 2, 6, 11),
            "ngram": pick(2, 3, 4, 6),
            "guesses": pick(1, 2, 5, 9),
            "nodes": pick(None, 1, 7, 24),
            "draft_length": pick(None, 1, 5, 20),
            "min_chance": pick(0.0, 0.05, 0.3),
            "shared_pool": pick(True, False),
            "pool_buckets": pick(1, 8, 128),
        }
        settings["prompt_pool"] = pick(True, False) or not (settings["window"] or settings["shared_pool"])
        print(settings)
        vocab, order, temperature = pick(3, 14, 60), pick(1, 2, 3), pick(0.0, 0.5, 1.0)
        model = MarkovTarget(vocab, order, temperature, int(torch.randint(1 << 20, (1,), generator=rng)))
        texts = prompts(rng, 4, vocab)
        outcome = hostile(LookaheadProposer(max_requests=4, eos_token_ids=[2], **settings), model, texts, rng, 2)
        for request, text in enumerate(texts):
            assert outcome.outputs[request] == plain(model, request, text, 60, 2)


def run(model, texts, rng, *, slots, **settings):
    proposer = LookaheadProposer(max_requests=slots, eos_token_ids=[3], **settings)
    return simulate(proposer, from_next_token(model), texts, max_new=50, slots=slots, rng=rng, eos=3, vocab=12)


def seen_as(request, model):
    """A model that takes its only request for `request` of a larger batch."""
    return lambda _, text: model(request, text)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0, "nodes": 16, "draft_length": 12},
        {"window": 5, "ngram": 2},
        {"window": 4, "ngram": 4, "prompt_pool": False},
    ],
    ids=str,
)
def test_another_requests_text_never_changes_a_requests_drafts(settings, rng):
    settings = settings | {
        "min_chance": 0.0
    }  # how many requests there are may matter (the next test), never their texts
    model = MarkovTarget(12, 2, 0.8, 5)
    texts = prompts(rng, 5, 12)
    together = run(model, texts, rng, slots=3, **settings)
    crowd = run(model, [*texts, *texts[:1] * 6], rng, slots=7, **settings)
    for request, text in enumerate(texts):
        alone = run(seen_as(request, model), [text], rng, slots=1, **settings)
        assert len(alone.proposed[0]) > 0
        assert together.proposed[request] == alone.proposed[0]
        assert crowd.proposed[request] == alone.proposed[0]


def test_a_node_must_be_likelier_the_more_requests_share_the_step():
    proposer = LookaheadProposer(max_requests=64, min_chance=0.12)
    least = [least_chance(proposer.min_chance, batch) for batch in (1, 8, 64)]
    assert least == pytest.approx([0.12, 0.522, 0.897], abs=1e-3)
    assert least_chance(0.0, 64) == 0.0


def test_a_shared_pool_lets_a_request_draft_from_what_another_emitted(rng):
    count_up = lambda _, text: (text[-1] + 1) % 12  # noqa: E731
    only_pool = {"window": 0, "ngram": 4, "prompt_pool": False, "shared_pool": True, "min_chance": 0.0}
    first, second = run(count_up, [[4], [4]], rng, slots=1, **only_pool).proposed
    assert first[0] == []
    assert second[0] == [(6, 0), (7, 1), (8, 2)]
    private = run(count_up, [[4], [4]], rng, slots=1, window=4, ngram=4, prompt_pool=False).proposed
    assert private[0] == private[1]


def test_end_of_sequence_is_never_drafted_from_the_window(rng):
    eos = 3
    model = MarkovTarget(6, 2, 1.0, 7)
    texts = [[token for token in text if token != eos] or [0] for text in prompts(rng, 12, 6)]
    proposer = LookaheadProposer(max_requests=2, window=5, ngram=3, prompt_pool=False, eos_token_ids=[eos])
    outcome = simulate(proposer, from_next_token(model), texts, max_new=40, slots=2, rng=rng, eos=eos, vocab=6)
    assert any(output[-1] == eos for output in outcome.outputs)
    drafts = [token for request in outcome.proposed for tree in request[:-1] for token, _ in tree]
    assert drafts
    assert eos not in drafts


def test_a_repeating_text_is_drafted_to_the_full_length():
    proposer = LookaheadProposer(max_requests=1, window=0, nodes=16, draft_length=16)
    loop = [5, 6, 7, 8] * 6
    outcome = simulate(
        proposer,
        from_next_token(lambda _, text: 5 + len(text) % 4),
        [loop],
        max_new=68,
        slots=1,
        rng=torch.Generator().manual_seed(0),
    )
    # The first token comes from the prompt's pass; every full match emits one token more than it has nodes.
    assert outcome.outputs == [loop * 2 + loop[:20]]
    assert outcome.tokens_per_step > 12


def test_settings_that_leave_nothing_to_draft_from_are_refused():
    with pytest.raises(ValueError, match="nothing to draft from"):
        LookaheadProposer(max_requests=1, window=0, prompt_pool=False)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_trees_are_never_larger_or_deeper_than_announced(settings, rng):
    proposer = LookaheadProposer(max_requests=2, **settings)
    shape = (settings.get("nodes") or settings["guesses"] * (settings.get("ngram", 5) - 1)) + max(
        settings["window"] * (settings.get("ngram", 5) - 1) - 1, 0
    )
    assert proposer.num_nodes == shape
    model = MarkovTarget(4, 1, 0.5, 1)
    outcome = simulate(proposer, from_next_token(model), prompts(rng, 2, 4), max_new=40, slots=2, rng=rng, vocab=4)
    assert max(len(tree) for request in outcome.proposed for tree in request) <= shape
