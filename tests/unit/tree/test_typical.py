# SPDX-License-Identifier: Apache-2.0
"""Typical acceptance: what it keeps, and that it is the walk where nothing is random."""

import pytest
import torch

from tests.unit.tree.naive import random_tree, typical, unpad
from vllm_spec_plugins.tree import TargetRows, TokenTree, Typical, Walk, chain

VOCAB = 6


def target_rows(tree, rng, scale, greedy=None):
    """Random logits of every row present, lines in random order among those of nobody; and the draws."""
    batch, rows = tree.depth.shape
    logits = scale * torch.randn(batch * rows + 3, VOCAB, generator=rng)
    index = torch.randperm(len(logits), generator=rng)[: batch * rows].view(batch, rows)
    drawn = logits[index].softmax(-1).view(-1, VOCAB).multinomial(1, generator=rng).view(batch, rows)
    if greedy is not None:
        drawn = logits[index].argmax(-1).where(greedy.unsqueeze(1), drawn)
    gone = torch.nn.functional.pad(tree.tokens < 0, (1, 0))
    return TargetRows(logits, index.masked_fill(gone, -1), greedy), drawn.masked_fill(gone, -1)


@pytest.mark.parametrize(
    ("eps", "delta", "scale"), [(0.09, 0.3, 2.0), (0.3, 0.9, 1.0), (0.5, 1.0, 4.0), (1.0, 0.0, 2.0)]
)
def test_it_keeps_the_first_of_the_longest_paths_of_typical_tokens(eps, delta, scale, rng):
    tree = random_tree(rng, batch=48, nodes=14, vocab=VOCAB)
    target, drawn = target_rows(tree, rng, scale)
    got = Typical(eps, delta)(tree, drawn, target)
    p = target.logits.softmax(-1)[target.index.clamp(min=0)].tolist()
    deeper = 0
    for b in range(48):
        tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
        rows, end = typical(tokens, parents, p[b], eps, delta)
        assert unpad(got.emitted[b]) == [*(tokens[row - 1] for row in rows), int(drawn[b, end])]
        assert got.path[b, : len(rows)].tolist() == rows
        deeper += len(rows)
    assert deeper > 0


def test_at_temperature_0_it_is_the_walk_also_beside_sampled_requests(rng):
    tree = random_tree(rng, batch=40, nodes=14, vocab=VOCAB, chainy=0.1)
    greedy = torch.rand(40, generator=rng) < 0.5
    target, drawn = target_rows(tree, rng, 0.5, greedy)
    got, walk = Typical()(tree, drawn, target), Walk()(tree, drawn)
    assert torch.equal(got.emitted[greedy], walk.emitted[greedy])
    assert torch.equal(got.path[greedy], walk.path[greedy])
    assert (got.emitted[~greedy] != walk.emitted[~greedy]).any()


def test_both_thresholds_bind():
    """Where the target is sure a token needs eps; where it is not, delta * exp(-entropy) is less."""
    sure = torch.tensor([0.85, 0.1, 0.05]).log()
    unsure = torch.full((3,), 1 / 3).log()
    target = TargetRows(torch.stack((sure, unsure)), torch.tensor([[0, 1, -1]]))
    two = TokenTree(torch.tensor([[2, 1]]), torch.tensor([[0, 0]]))
    kept = Typical(eps=0.09)(two, torch.tensor([[0, 0, 0]]), target)
    assert kept.emitted[0, :2].tolist() == [1, 0]  # .1 > .09, .05 is not
    line = chain(torch.tensor([[0, 1]]))
    every = TargetRows(target.logits, torch.tensor([[0, 1, 1]]))
    assert Typical(eps=0.9, delta=0.9)(line, torch.tensor([[2, 2, 2]]), every).num_accepted.tolist() == [2]
    assert Typical(eps=0.9, delta=1.1)(line, torch.tensor([[2, 2, 2]]), every).num_accepted.tolist() == [1]


def test_what_was_filtered_out_and_what_was_cut_is_never_kept():
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0]])
    tree = chain(torch.tensor([[1], [0]]))
    target = TargetRows(logits, torch.tensor([[0, 1], [0, -1]]))
    kept = Typical(eps=0.01, delta=0.0)(tree, torch.tensor([[2, 0], [2, -1]]), target)
    assert kept.num_accepted.tolist() == [0, 0]
    assert kept.emitted[:, 0].tolist() == [2, 2]
    nobody = Typical()(tree, torch.full((2, 2), -1), TargetRows(logits, torch.full((2, 2), -1)))
    assert nobody.num_emitted.tolist() == [0, 0]


def test_it_says_that_it_is_lossy():
    assert (Typical.lossless, Walk.lossless) == (False, True)
    assert Typical.needs_target
