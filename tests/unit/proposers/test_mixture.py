# SPDX-License-Identifier: Apache-2.0
"""Several proposers as one: their best nodes in one tree, the output plain decoding's whatever they propose."""

import pytest
import torch

from tests.unit.proposers.simulate import MarkovTarget, from_next_token, plain, simulate
from vllm_spec_plugins.proposers.lookahead import LookaheadProposer
from vllm_spec_plugins.proposers.mixture import MixtureProposer
from vllm_spec_plugins.tree import TokenTree, chain


class Guesser:
    """Chains of `nodes` tokens that are each right with chance `right`, and promise to be with `promise`.

    Knows only requests in even slots if `picky`; `remembers` if it is to be asked after every step.
    """

    name = "guesser"
    reads_draws = reads_hidden = False

    def __init__(self, target, right, promise, nodes, seed, picky=False, remembers=False):
        self.target, self.right, self.promise, self.picky, self.remembers = target, right, promise, picky, remembers
        self.num_nodes = self.max_depth = nodes
        self.rng = torch.Generator().manual_seed(seed)
        self.moved_in, self.offered = [], 0

    def add_request(self, slot, prompt_len):
        self.moved_in.append(slot)

    def propose(self, ctx):
        tokens = torch.full((len(ctx.slots), self.num_nodes), -1)
        for b, (slot, length) in enumerate(zip(ctx.slots.tolist(), ctx.lengths.tolist(), strict=True)):
            text = ctx.token_ids[slot, :length].tolist()
            for node in range(0 if self.picky and slot % 2 else self.num_nodes):
                true = self.target(0, text)
                right = torch.rand(1, generator=self.rng) < self.right
                tokens[b, node] = true if right else (true + 1) % self.target.vocab
                text.append(int(tokens[b, node]))
                self.offered += 1
        made = chain(tokens)
        chance = None
        if self.promise is not None:
            chance = self.promise ** torch.arange(1, self.num_nodes + 1) * (tokens >= 0)
        return TokenTree(made.tokens, made.parents, chance=chance)


def run(proposer, target, rng, slots=3, **options):
    prompts = [torch.randint(target.vocab, (9,), generator=rng).tolist() for _ in range(6)]
    outcome = simulate(
        proposer, from_next_token(target), prompts, max_new=60, slots=slots, rng=rng, vocab=target.vocab, **options
    )
    assert outcome.outputs == [plain(target, 0, prompt, 60, eos=-1) for prompt in prompts]
    return outcome


def greedy(vocab=12):
    """A target without noise, so the request does not matter."""
    return MarkovTarget(vocab, 2, 0.0, 3)


def test_the_output_is_plain_decodings_under_every_disturbance(rng):
    target = greedy()
    sources = [
        LookaheadProposer(max_requests=3, nodes=10, guesses=3, min_chance=0.0),
        Guesser(target, 0.6, 0.5, 4, seed=1, picky=True),
        Guesser(target, 0.4, None, 3, seed=2),
    ]
    mixture = MixtureProposer(sources, max_requests=3, nodes=8, min_chance=0.02)
    assert (mixture.num_nodes, mixture.max_depth) == (8, 8)
    budgets = iter(range(10**9))
    run(mixture, target, rng, chunks=2, skip=0.2, cut=0.3, budget=lambda: (None, 5, 0, 8)[next(budgets) % 4])
    assert sorted(sources[1].moved_in) == sorted(sources[2].moved_in) and len(sources[1].moved_in) == 6


def test_the_budget_goes_to_the_source_that_keeps_its_promises(rng):
    """Both promise the same; the liar stands first."""
    target = greedy(vocab=40)
    liar, honest = Guesser(target, 0.05, 0.7, 4, seed=1), Guesser(target, 0.9, 0.7, 4, seed=2)
    alone = run(honest, target, rng).tokens_per_step
    mixture = MixtureProposer([liar, honest], max_requests=3, nodes=4, min_chance=0.0)
    found = run(mixture, target, rng)
    assert found.tokens_per_step > 0.9 * alone > 2.0
    lies, keeps = mixture.calibration.factors(torch.tensor([0, 1, 2])).unbind(1)
    assert (lies < 0.3).all() and (keeps > 1.0).all()


def test_a_request_that_one_source_knows_nothing_of_is_drafted_by_the_other(rng):
    target = greedy()
    known = Guesser(target, 1.0, 0.9, 4, seed=1, picky=True)
    everywhere = Guesser(target, 1.0, 0.9, 2, seed=2)
    mixture = MixtureProposer([known, everywhere], max_requests=2, nodes=4, min_chance=0.0)
    outcome = run(mixture, target, rng, slots=2)
    sizes = {len(tree) for request in outcome.proposed for tree in request}
    assert sizes == {2, 4}


def test_nodes_that_no_longer_pay_are_left_out(rng):
    target = greedy(vocab=40)
    liar = Guesser(target, 0.0, 0.8, 4, seed=1)
    mixture = MixtureProposer([liar, Guesser(target, 0.0, 0.8, 2, seed=2)], max_requests=3, min_chance=0.12)
    outcome = run(mixture, target, rng)
    assert outcome.tokens_per_step == 1.0
    assert outcome.nodes_per_step < 1.0


@pytest.mark.parametrize("flag", ["reads_draws", "reads_hidden", "remembers"])
def test_a_mixture_needs_what_any_of_its_sources_needs(flag):
    sources = [Guesser(greedy(), 1.0, 0.9, 2, seed=1), Guesser(greedy(), 1.0, 0.9, 3, seed=2)]
    assert not getattr(MixtureProposer(sources, max_requests=1), flag)
    setattr(sources[1], flag, True)
    assert getattr(MixtureProposer(sources, max_requests=1), flag)
    assert MixtureProposer(sources, max_requests=1).num_nodes == 3
