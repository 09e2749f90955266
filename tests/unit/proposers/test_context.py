# SPDX-License-Identifier: Apache-2.0
"""A step's context, of some of the batch's requests."""

import torch

from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.tree import TokenTree


def context(**given):
    return StepContext(
        torch.tensor([4, 0, 2]), torch.zeros(5, 9).int(), torch.tensor([3, 7, 5]), 8, torch.ones(3), **given
    )


def test_what_is_known_of_some_requests_is_what_is_known_of_them_among_all():
    asked = []

    def likeliest(logits, request, place, count):
        asked.append((request.tolist(), place.tolist(), count))
        return logits, logits

    tree = TokenTree(torch.arange(12).view(3, 4), torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 1]]), 4)
    drawn, hidden = torch.arange(15).view(3, 5), torch.arange(6.0).view(3, 2)
    index = torch.tensor([0, 2])
    part = context(drawn=drawn, tree=tree, hidden=hidden, likeliest=likeliest, budget=3).take(index)
    assert part.slots.tolist() == [4, 2] and part.lengths.tolist() == [3, 5] and len(part.num_emitted) == 2
    assert part.token_ids.shape == (5, 9) and part.max_length == 8 and part.budget == 3
    assert torch.equal(part.drawn, drawn[index]) and torch.equal(part.hidden, hidden[index])
    assert torch.equal(part.tree.tokens, tree.tokens[index]) and torch.equal(part.tree.depth, tree.depth[index])
    part.likeliest(torch.zeros(2, 6), torch.tensor([1, 0]), torch.tensor([2, 3]), 2)
    assert asked == [([2, 0], [2, 3], 2)]


def test_what_is_not_known_of_all_is_not_known_of_some():
    part = context().take(torch.tensor([1]))
    assert part.slots.tolist() == [0]
    assert part.drawn is part.tree is part.hidden is part.likeliest is part.budget is None
