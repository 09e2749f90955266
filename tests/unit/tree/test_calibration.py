# SPDX-License-Identifier: Apache-2.0
"""What a source's promises turn out to be worth: judged by emitted tokens alone, per request, leaning on all requests."""

from types import SimpleNamespace

import pytest
import torch

from tests.unit.tree.naive import paths, random_tree
from vllm_spec_plugins.tree import Forest, TokenTree, chain, union
from vllm_spec_plugins.tree.calibration import Calibration
from vllm_spec_plugins.tree.union import MOST

CPU = torch.device("cpu")


def step(slots, texts, emitted):
    width = max(map(len, texts))
    token_ids = torch.full((max(slots) + 1, width), 7, dtype=torch.int32)
    for slot, text in zip(slots, texts, strict=True):
        token_ids[slot, : len(text)] = torch.tensor(text)
    return SimpleNamespace(
        slots=torch.tensor(slots),
        token_ids=token_ids,
        lengths=torch.tensor([len(text) for text in texts]),
        num_emitted=torch.tensor(emitted, dtype=torch.int32),
    )


def said(tokens, chances):
    """A chain per request with these path chances."""
    made = chain(torch.tensor(tokens))
    return TokenTree(made.tokens, made.parents, chance=torch.tensor(chances))


def judged(trees, request, text):
    """[S][places, promised, right] by the definition: every emitted token, every source that has the path to it."""
    out = []
    for tree in trees:
        names = paths(tree, request)
        chance = dict(zip(names, tree.chance[request].tolist(), strict=False))
        places = promised = right = 0.0
        for at in range(len(text)):
            here = [name for name in names if len(name) == at + 1 and name[:-1] == tuple(text[:at])]
            if here:
                above = chance[tuple(text[:at])] if at else 1.0
                places, right = places + 1, right + (tuple(text[: at + 1]) in here)
                share = sum(chance[name] for name in here) / above
                odds = share / (1.0 - min(share, MOST))
                promised += odds / (1.0 + odds)
        out.append([places, promised, right])
    return out


def distinct(rng, batch, nodes):
    """Random trees without two nodes of one path, with chances."""
    tree = random_tree(rng, batch, nodes, 3)
    plain = TokenTree(tree.tokens, tree.parents, tree.max_depth, chance=0.3 ** tree.depth[:, 1:] * (tree.tokens >= 0))
    return union(Forest.of([plain]), torch.ones(batch, 1).double(), nodes)


def test_every_emitted_token_judges_the_sources_that_have_the_path_to_it(rng):
    batch, sizes = 24, (9, 5)
    trees = [distinct(rng, batch, size) for size in sizes]
    calibration = Calibration(batch, sizes, 9, CPU)
    prompts = torch.randint(1, 6, (batch,), generator=rng).tolist()
    calibration.offer(torch.arange(batch), torch.tensor(prompts), Forest.of(trees))
    emitted = torch.randint(5, (batch,), generator=rng).tolist()
    new = [torch.randint(3, (count,), generator=rng).tolist() for count in emitted]
    calibration.observe(step(list(range(batch)), [[8] * p + n for p, n in zip(prompts, new, strict=True)], emitted))
    expected = torch.tensor([judged(trees, b, new[b]) for b in range(batch)]).double()
    assert expected[:, :, 2].sum() > 0
    torch.testing.assert_close(calibration.counts[:-1], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(calibration.counts[-1], expected.sum(0), rtol=1e-6, atol=1e-6)


def test_what_was_offered_is_judged_once_and_only_by_the_tokens_right_behind_it():
    calibration = Calibration(1, (2,), 2, CPU)
    tree = said([[5, 6]], [[0.5, 0.25]])
    calibration.offer(torch.tensor([0]), torch.tensor([1]), Forest.of([tree]))
    calibration.observe(step([0], [[8, 5, 5]], [1]))  # a step went by unobserved
    assert calibration.counts.sum() == 0
    calibration.observe(step([0], [[8, 5]], [1]))
    assert calibration.counts.sum() == 0  # forgotten
    calibration.offer(torch.tensor([0]), torch.tensor([1]), Forest.of([tree]))
    for _ in range(2):
        calibration.observe(step([0], [[8, 5, 9]], [2]))
        assert calibration.counts[0].tolist() == [[2.0, pytest.approx(1.0), 1.0]]


def test_more_emitted_tokens_than_the_trees_are_deep_are_no_harm():
    calibration = Calibration(1, (1,), 1, CPU)
    calibration.offer(torch.tensor([0]), torch.tensor([1]), Forest.of([said([[5]], [[0.5]])]))
    calibration.observe(step([0], [[8, 5, 6, 7]], [3]))
    assert calibration.counts[0].tolist() == [[1.0, pytest.approx(0.5), 1.0]]


def test_factors_make_promises_come_true(rng):
    """One source promises .8 where .3 is right, one .2 where .6 is, one nothing: weighted, they say what is right."""
    promise, truth = (0.8, 0.2), (0.3, 0.6)
    calibration = Calibration(2, (1, 1, 1), 1, CPU)
    slots = torch.tensor([1])
    seen = []
    for turn in range(1200):
        trees = [said([[t]], [[p]]) for t, p in zip((4, 5), promise, strict=True)] + [TokenTree.empty(1, 1)]
        calibration.offer(slots, torch.tensor([1]), Forest.of(trees))
        token = 4 if torch.rand(1, generator=rng) < truth[0] else 5 if torch.rand(1, generator=rng) < 0.6 / 0.7 else 6
        calibration.observe(step([1], [[0, token]], [1]))
        if turn > 300:
            factor = calibration.factors(slots)[0, :2]
            odds = factor * torch.tensor([p / (1 - p) for p in promise])
            seen.append(odds / (1 + odds))
    assert torch.allclose(torch.stack(seen).mean(0), torch.tensor(truth).double(), atol=0.08)
    assert calibration.factors(slots)[0, 2] == pytest.approx(1.0)


def test_a_request_leans_on_all_until_it_has_shown_otherwise():
    calibration = Calibration(3, (1,), 1, CPU)
    tree = Forest.of([said([[4]], [[0.5]])])

    def shown(slot, token, turns):
        for _ in range(turns):
            calibration.offer(torch.tensor([slot]), torch.tensor([1]), tree)
            calibration.observe(step([slot], [[1, token]], [1]))
        return float(calibration.factors(torch.tensor([slot]))[0, 0])

    new = float(calibration.factors(torch.tensor([2]))[0, 0])
    assert new == pytest.approx(1.0)
    assert shown(0, 4, 200) > 20
    calibration.clear(1)
    assert float(calibration.factors(torch.tensor([1]))[0, 0]) > 10
    assert shown(1, 9, 40) < 1.0
    assert shown(0, 4, 1) > 5


def test_factors_stay_finite():
    calibration = Calibration(1, (1,), 1, CPU)
    for chance, token in ((1.0, 9), (0.0, 4)):
        for _ in range(300):
            calibration.offer(torch.tensor([0]), torch.tensor([1]), Forest.of([said([[4]], [[chance]])]))
            calibration.observe(step([0], [[1, token]], [1]))
        assert 1e-5 < float(calibration.factors(torch.tensor([0]))[0, 0]) < 1e5
