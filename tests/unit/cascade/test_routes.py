# SPDX-License-Identifier: Apache-2.0
"""Routes: thresholds by request, and what makes a request easy or hard."""

import math

import pytest
import torch

from tests.unit.tree.naive import random_tree
from vllm_spec_plugins.cascade.routes import Routes, compare
from vllm_spec_plugins.cascade.rules import Deferral, deferral_rule
from vllm_spec_plugins.tree import TargetRows, TokenTree, Walk

# Whatever is shown here is shown of the loops and of the tensor code.
pytestmark = pytest.mark.usefixtures("on_both_paths")


def routes(text="confidence:0.6", route="auto"):
    return Routes(deferral_rule(text), 4, route, easy=0.7)


def judge(found, slots, right, depth=4):
    """One chain per slot whose first choices are all drawn, or none of them."""
    count = len(slots)
    tree = TokenTree(torch.arange(depth).expand(count, -1), torch.arange(depth).expand(count, -1))
    drawn = torch.full((count, depth + 1), 9)
    drawn[right, :depth] = torch.arange(depth)
    found.observe(torch.tensor(slots), tree, drawn, Walk()(tree, drawn))


def test_a_route_decides_the_threshold_and_a_request_may_bring_its_own():
    found = routes()
    found.add(0, "cheap")
    found.add(1, "full")
    found.add(2, bound=0.25)
    found.add(3)
    every = torch.arange(4)
    assert torch.allclose(found.thresholds(every), torch.tensor([0.6, math.inf, 0.25, 0.6]))
    assert found.stands(torch.tensor([0.6, 1.0, 0.3, 0.5]), every).tolist() == [1.0, 0.0, 1.0, 0.0]
    found.add(2)
    assert found.thresholds(every)[2] == found.thresholds(every)[3]


def test_a_rule_that_needs_the_full_model_is_expected_to_keep_as_often_as_it_has_of_late():
    found = routes("difference:0.1")
    found.add(0, "cheap")
    found.add(1, "full")
    assert found.stands(torch.zeros(2), torch.arange(2)).tolist() == [0.5, 0.0]
    for _ in range(40):
        judge(found, [0, 1], torch.tensor([False, True]))
    cheap, full = found.stands(torch.zeros(2), torch.arange(2)).tolist()
    assert full == 0.0 and 0 < cheap < 0.2


def test_an_auto_request_is_escalated_when_the_draft_disagrees_and_comes_back_when_it_agrees():
    found = routes()
    for slot in range(4):
        found.add(slot, ["auto", "auto", "cheap", "full"][slot])
    every = torch.arange(4)
    for _ in range(12):
        judge(found, [0, 1, 2, 3], torch.tensor([False, True, False, True]))
    assert found.easy(every).tolist() == [False, True, True, True]
    assert found.thresholds(every).isinf().tolist() == [True, False, False, True]
    for _ in range(12):
        judge(found, [0], torch.tensor([True]))
    assert found.easy(every).tolist() == [True, True, True, True]
    judge(found, [1] * 1, torch.tensor([False]))
    found.add(1)
    assert found.judged[1] == found.agreed[1] == 0


def test_choices_are_compared_along_the_accepted_path(rng):
    tree = random_tree(rng, batch=60, nodes=12, vocab=3)
    drawn = torch.randint(0, 3, (60, 13), generator=rng)
    confident = TokenTree(tree.tokens, tree.parents, tree.max_depth, confidence=torch.rand(60, 12, generator=rng))
    target = TargetRows(torch.zeros(13 * 60, 3), torch.arange(13 * 60).view(60, 13))
    acceptance = Deferral(deferral_rule("confidence:0.5"))(confident, drawn, target)
    judged, agreed, kept = compare(tree, drawn, acceptance)
    for b in range(60):
        rows = [0, *acceptance.path[b, : int(acceptance.num_accepted[b])].tolist()]
        firsts = []
        for row in rows:
            children = [j for j in range(12) if tree.tokens[b, j] >= 0 and tree.parents[b, j] == row]
            firsts += [(int(tree.tokens[b, children[0]]), int(drawn[b, row]), children[0] + 1)] if children else []
        assert int(judged[b]) == len(firsts)
        assert int(agreed[b]) == sum(cheap == full for cheap, full, _ in firsts)
        assert int(kept[b]) == sum(child in rows and cheap != full for cheap, full, child in firsts)
    assert 0 < int(agreed.sum()) < int(judged.sum()) and int(kept.sum()) > 0
