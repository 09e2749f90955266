# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.proposers.simulate import MarkovTarget, from_next_token, plain, simulate
from tests.unit.proposers.test_lookahead import hostile, prompts
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.proposers.jacobi import JacobiProposer
from vllm_spec_plugins.tree.tree import TokenTree


def proposer(block=6, mode="parallel", parallel_tokens=0, requests=4):
    return JacobiProposer(max_requests=requests, device="cpu", block=block, mode=mode, parallel_tokens=parallel_tokens)


SETTINGS = [(1, "parallel", 0), (7, "parallel", 0), (16, "blocks", 0), (3, "blocks", 0), (5, "hybrid", 17)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_text_is_that_of_plain_decoding(settings, temperature, rng):
    model = MarkovTarget(14, 2, temperature, int(torch.randint(1 << 20, (1,), generator=rng)))
    texts = prompts(rng, 9, 14)
    outcome = hostile(proposer(*settings), model, texts, rng, eos=3)
    for request, text in enumerate(texts):
        assert outcome.outputs[request] == plain(model, request, text, 60, 3)


def steps_of(target, block, mode, max_new, rng, parallel_tokens=0):
    """Steps for one request whose target is a function of the position and of so many tokens before it."""
    return simulate(
        proposer(block, mode, parallel_tokens, 1), from_next_token(target), [[5, 6]], max_new=max_new, slots=1, rng=rng
    )


def test_text_that_hangs_on_its_position_alone_is_fixed_a_block_at_a_time(rng):
    def target(request, text):
        return (len(text) * 7 + 3) % 47

    # The first pass finds nothing and draws the whole block; the second finds all of it right.
    outcome = steps_of(target, 10, "parallel", 60, rng)
    assert outcome.outputs[0] == [(n * 7 + 3) % 47 for n in range(2, 62)]
    assert outcome.tokens_per_step > 4.5


def test_a_block_that_slides_begins_sooner_than_one_that_waits(rng):
    """Text that depends on the token two back: an iteration fixes two tokens, and a sliding block keeps its front busy."""

    def target(request, text):
        return (text[-2] * 5 + 7 * len(text)) % 41

    sliding, waiting = (steps_of(target, 12, mode, 120, rng) for mode in ("parallel", "blocks"))
    assert sliding.outputs == waiting.outputs
    assert 1.6 < waiting.tokens_per_step <= sliding.tokens_per_step


def test_blocks_end_where_they_were_to_end():
    state = proposer(block=5, mode="blocks", requests=1)
    state.add_request(0, 3)
    token_ids = torch.arange(40, dtype=torch.int32).unsqueeze(0)
    lengths = []
    for emitted, length in [(1, 4), (2, 6), (1, 7), (3, 10), (6, 16)]:
        drawn = torch.full((1, 6), 9)
        ctx = StepContext(
            torch.tensor([0]), token_ids, torch.tensor([length]), length, torch.tensor([emitted]), drawn,
            TokenTree.empty(1, 5),
        )  # fmt: skip
        lengths.append(int(state.propose(ctx).num_nodes))
    assert lengths == [4, 2, 1, 5, 5]  # the last two steps overran their block: a new one begins


def test_a_hybrid_decodes_plainly_behind_its_first_tokens(rng):
    outcome = steps_of(lambda request, text: len(text) % 30, 4, "hybrid", 60, rng, parallel_tokens=20)
    lengths = [len(tree) for tree in outcome.proposed[0]]
    assert lengths[0] > 0 and lengths[-1] == 0
    assert lengths == sorted(lengths, key=lambda n: n == 0)


def test_draws_behind_an_accepted_path_are_the_next_guesses():
    state = proposer(block=4, requests=1)
    state.add_request(0, 2)
    token_ids = torch.tensor([[1, 2, 3, 4, 20, 21, 0, 0]], dtype=torch.int32)
    drawn = torch.tensor([[20, 21, 22, 23, 24]])  # rows 0 and 1 emitted 20 and 21, the rest are guesses
    ctx = StepContext(
        torch.tensor([0]), token_ids, torch.tensor([6]), 6, torch.tensor([2]), drawn, TokenTree.empty(1, 4)
    )
    tree = state.propose(ctx)
    assert tree.tokens.tolist() == [[22, 23, 24, 21]]  # and the text's last token where nothing was drawn
    assert tree.parents.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("mode", "parallel_tokens", "expected"),
    [("blocks", 0, (6, 3)), ("parallel", 0, (6, 3)), ("hybrid", 9, (3, 2))],
)
def test_iterations_and_finished_blocks_are_counted(mode, parallel_tokens, expected):
    """Steps that emit 2, 3, 6, 0 (still in the prompt), 1, 1 and 5 tokens, in blocks of 5."""
    state = proposer(block=5, mode=mode, parallel_tokens=parallel_tokens, requests=1)
    state.add_request(0, 3)
    token_ids, length = torch.arange(60, dtype=torch.int32).unsqueeze(0), 3
    for emitted in (2, 3, 6, 0, 1, 1, 5):
        length += emitted
        counts, drawn = torch.tensor([emitted]), torch.zeros(1, 6, dtype=torch.int64)
        state.propose(
            StepContext(
                torch.tensor([0]), token_ids, torch.tensor([length]), length, counts, drawn, TokenTree.empty(1, 5)
            )
        )
    assert tuple(state.take_counts().tolist()) == expected
    assert state.take_counts().tolist() == [0, 0]
