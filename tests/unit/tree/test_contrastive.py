# SPDX-License-Identifier: Apache-2.0
"""Contrastive search's rule against a loop over its formula."""

import math

import pytest
import torch

from vllm_spec_plugins.tree.contrastive import candidates, choose, directions


def naive(p, hidden, context, alpha):
    """Each candidate's score by the formula, in Python's numbers."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    return [(1 - alpha) * q - alpha * max(cosine(h, c) for c in context) for q, h in zip(p, hidden, strict=True)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_is_the_formulas(alpha, dtype, rng):
    ranks = set()
    for _ in range(100):
        k, length, size = (int(torch.randint(1, top, (), generator=rng)) for top in (7, 12, 9))
        _, p = candidates(torch.randn(1, 11, generator=rng), k)
        hidden = (torch.randn(k, size, generator=rng) * 3).to(dtype)
        context = (torch.randn(length, size, generator=rng) * 3).to(dtype)
        chosen = choose(p[0], hidden, directions(context), alpha)
        assert chosen.shape == () and chosen.dtype == torch.int64
        scores = naive(p[0].tolist(), hidden.tolist(), context.tolist(), alpha)
        assert scores[chosen] == pytest.approx(max(scores), abs=1e-5)
        ranks.add(int(chosen))
    assert ranks == {0} if alpha == 0 else len(ranks) > 1


def test_of_equal_candidates_the_likeliest_is_chosen():
    p, hidden = torch.tensor([0.4, 0.3, 0.3]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    context = directions(torch.tensor([[3.0, 0.0]]))
    assert int(choose(p, hidden, context, 0.6)) == 1  # the first repeats the context, the others are alike
    assert int(choose(p, hidden, context, 0.0)) == 0


def test_candidates_are_the_likeliest_tokens_and_what_the_model_gives_them(rng):
    logits = torch.randn(5, 40, generator=rng) * 4
    tokens, p = candidates(logits, 6)
    for line in range(5):
        weights = [math.exp(x) for x in logits[line].tolist()]
        order = sorted(range(40), key=lambda i: -weights[i])[:6]
        assert tokens[line].tolist() == order
        assert p[line].tolist() == pytest.approx([weights[i] / sum(weights) for i in order], rel=1e-5)


def test_logits_that_round_to_equal_probabilities_keep_their_order():
    logits = torch.full((1, 8), -50.0)
    logits[0, 5], logits[0, 2] = 10.0, 10.0 - 1e-6 * 10
    tokens, _ = candidates(logits, 2)
    assert tokens.tolist() == [[5, 2]]
