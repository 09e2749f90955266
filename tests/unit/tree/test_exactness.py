# SPDX-License-Identifier: Apache-2.0
"""Which acceptance rules are exact, by enumeration: the walk and three published rules are, two look-alikes are not."""

from functools import partial
from itertools import product

import pytest
import torch

from tests.unit.tree import rules
from vllm_spec_plugins.tree import TokenTree, Walk, trie

VOCAB = 5


def pair(rng, scale=1.5):
    """Two random distributions over the vocabulary, in double precision."""
    return torch.randn(2, VOCAB, generator=rng, dtype=torch.float64).mul(scale).softmax(1)


@pytest.mark.parametrize(
    ("choice", "rule"),
    [
        (rules.independent, rules.multi_step),
        (rules.without_replacement, rules.recursive_rejection),
        (partial(rules.independent, count=3), rules.multi_step),
        (partial(rules.without_replacement, count=3), rules.recursive_rejection),
        (rules.best_two, rules.one_hot),
        (rules.independent, rules.one_hot),
    ],
)
def test_published_exact_rules_return_the_target_distribution(choice, rule, rng):
    for _ in range(20):
        deviation, accepted = rules.enumerate_rule(*pair(rng), choice, rule)
        assert deviation < 1e-12
        assert 0 < accepted <= 1 + 1e-12


@pytest.mark.parametrize(
    ("choice", "rule", "at_least"),
    [
        (rules.without_replacement, rules.wrong_not_renormalised, 1e-2),
        (partial(rules.without_replacement, count=3), rules.wrong_not_renormalised, 1e-2),
        (rules.best_two, rules.multi_step, 1e-1),
        (rules.best_two, rules.recursive_rejection, 1e-1),
    ],
)
def test_wrong_rules_fail_the_same_enumeration(choice, rule, at_least, rng):
    worst = max(rules.enumerate_rule(*pair(rng), choice, rule)[0] for _ in range(20))
    assert worst > at_least


def test_drawing_without_replacement_accepts_more_than_independent_draws(rng):
    pairs = [pair(rng) for _ in range(20)]
    rrsw = sum(rules.enumerate_rule(p, q, rules.without_replacement, rules.recursive_rejection)[1] for p, q in pairs)
    mss = sum(rules.enumerate_rule(p, q, rules.independent, rules.multi_step)[1] for p, q in pairs)
    assert rrsw > mss


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_references_for_many_nodes_accept_what_the_enumeration_accepts(count, rng):
    """In sum, and never more of a token than the target would emit."""
    for _ in range(3):
        p, q = pair(rng)
        *_, independent = rules.specinfer_accepts(p[None], q[None], count)
        choice = partial(rules.independent, count=count)
        assert float(independent.sum()) == pytest.approx(rules.enumerate_rule(p, q, choice, rules.multi_step)[1])
        assert (independent[0] <= p + 1e-12).all()
        *_, distinct = rules.rrsw_accepts(p.expand(20000, -1), q.expand(20000, -1), count, rng)
        choice = partial(rules.without_replacement, count=count)
        exact = rules.enumerate_rule(p, q, choice, rules.recursive_rejection)[1]
        assert float(distinct.sum(1).mean()) == pytest.approx(exact, abs=0.01)
        assert (distinct.mean(0) <= p + 0.01).all()


def test_the_walk_over_a_given_tree_returns_the_target_distribution_of_three_tokens(rng):
    """Every outcome of the draws at every row, with its probability, through the walk; where it stops, decoding goes
    on plainly. The distribution of the first three tokens must be the product of the target's conditionals."""
    tables = [torch.randn(VOCAB**n, VOCAB, generator=rng, dtype=torch.float64).softmax(1) for n in range(3)]

    def target(prefix):
        index = 0
        for token in prefix:
            index = index * VOCAB + token
        return tables[len(prefix)][index]

    # Root with children 0 and 3, one of them twice, and grandchildren below both.
    tree = TokenTree(torch.tensor([[0, 3, 3, 1, 4, 1]]), torch.tensor([[0, 0, 0, 1, 2, 2]]))
    prefixes = [(), (0,), (3,), (0, 1), (3, 4), (3, 1)]  # one draw per distinct path: duplicates draw alike
    row_of = torch.tensor([0, 1, 2, 2, 3, 4, 5])
    draws = torch.tensor(list(product(range(VOCAB), repeat=len(prefixes))))
    weight = torch.ones(len(draws), dtype=torch.float64)
    for n, prefix in enumerate(prefixes):
        weight *= target(prefix)[draws[:, n]]
    many = TokenTree(tree.tokens.expand(len(draws), -1), tree.parents.expand(len(draws), -1))
    kept = Walk()(many, draws[:, row_of])

    out: dict[tuple[int, ...], float] = dict.fromkeys(product(range(VOCAB), repeat=3), 0.0)
    for emitted, count, w in zip(kept.emitted.tolist(), kept.num_emitted.tolist(), weight.tolist(), strict=True):
        head = tuple(emitted[:count])[:3]
        tails = [((), w)]
        while len(head) + len(tails[0][0]) < 3:
            tails = [((*t, x), m * float(target(head + t)[x])) for t, m in tails for x in range(VOCAB)]
        for tail, mass in tails:
            out[head + tail] += mass
    for text, mass in out.items():
        truth = float(target(())[text[0]] * target(text[:1])[text[1]] * target(text[:2])[text[2]])
        assert mass == pytest.approx(truth, abs=1e-12)
    assert int(kept.num_accepted.max()) == 2


def noise_grid(levels):
    """Gumbel noise as every vector of a grid of quantiles, [levels ** VOCAB, VOCAB]: noise that can be enumerated."""
    quantile = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    # A tiny distinct shift per token breaks ties.
    columns = [-torch.log(-torch.log(quantile + 1e-6 * v)) for v in range(VOCAB)]
    return torch.cartesian_prod(*columns)


def test_the_walk_over_children_made_with_the_same_noise_is_plain_decoding_noise_by_noise(rng):
    noise = noise_grid(9)
    for _ in range(5):
        p, q = pair(rng)
        plain = (p.log() + noise).argmax(1)
        children = (q.log() + noise).topk(2, dim=1).indices
        tree = trie(children.unsqueeze(2), 2)
        drawn = torch.zeros(len(noise), 3, dtype=torch.int64)
        drawn[:, 0] = plain
        kept = Walk()(tree, drawn)
        assert torch.equal(kept.emitted[:, 0], plain)
        assert torch.equal(kept.num_accepted > 0, (children == plain.unsqueeze(1)).any(1))
        # The grid stands for the real noise: its argmax is distributed as p, up to the grid.
        assert (plain.bincount(minlength=VOCAB) / len(noise) - p).abs().max() < 0.06
