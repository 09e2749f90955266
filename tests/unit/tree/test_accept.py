# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tree.naive import random_tree, unpad, walk
from vllm_spec_plugins.tree import (
    Acceptance,
    AcceptRule,
    TargetRows,
    TokenTree,
    Walk,
    accept_down_to,
    chain,
    deepest_reachable,
)


def draws_by_path(tree: TokenTree, rng: torch.Generator, vocab: int) -> torch.Tensor:
    """The target's draw at every row: a function of the row's path, so rows that spell the same path agree."""
    key = torch.zeros_like(tree.depth)
    salt = int(torch.randint(1 << 30, (1,), generator=rng))
    for node in range(tree.tokens.shape[1]):
        above = key.gather(1, tree.parents[:, node : node + 1]).squeeze(1)
        key[:, node + 1] = (above * 31 + tree.tokens[:, node] + 7) % 1000003
    drawn = (key * 48271 + salt) % 65537 % vocab
    drawn[:, 1:].masked_fill_(tree.tokens < 0, -1)
    return drawn


@pytest.mark.parametrize("nodes", [0, 1, 5, 24, 70])
def test_the_walk_emits_what_a_step_by_step_walk_emits(nodes, rng):
    accepted = 0
    for _ in range(10):
        tree = random_tree(rng, batch=16, nodes=nodes, vocab=2)
        drawn = draws_by_path(tree, rng, vocab=2)
        got = Walk()(tree, drawn)
        for b in range(16):
            rows, emitted = walk(tree.tokens[b].tolist(), tree.parents[b].tolist(), drawn[b].tolist())
            assert int(got.num_accepted[b]) == len(rows)
            assert int(got.num_emitted[b]) == len(emitted)
            assert unpad(got.emitted[b]) == emitted
            assert len(got.path[b]) == nodes
            assert got.path[b, len(rows) :].eq(0).all()
            # Duplicates spell the same path by other rows: compare tokens, and the path's own integrity.
            on_path = got.path[b, : len(rows)].tolist()
            assert [tree.tokens[b, row - 1].item() for row in on_path] == emitted[:-1]
            assert [tree.parents[b, row - 1].item() for row in on_path] == [0, *on_path][: len(on_path)]
            accepted += len(rows)
    assert nodes == 0 or accepted > 0


def test_among_equal_paths_the_first_rows_are_taken():
    tree = TokenTree(torch.tensor([[5, 5, 6, 6]]), torch.tensor([[0, 0, 2, 1]]))
    got = Walk()(tree, torch.tensor([[5, 6, 6, 9, 9]]))
    assert got.path[0, :2].tolist() == [2, 3]  # row 3 is the first of the two deepest, its parent is row 2
    assert got.emitted[0].tolist() == [5, 6, 9, -1, -1]


def test_a_fully_accepted_chain_emits_one_token_more_than_it_has_nodes():
    got = Walk()(chain(torch.tensor([[1, 2, 3]])), torch.tensor([[1, 2, 3, 4]]))
    assert got.emitted.tolist() == [[1, 2, 3, 4]]
    assert got.path.tolist() == [[1, 2, 3]]


def test_a_request_without_a_draw_emits_nothing_whatever_its_tree_holds():
    tree = chain(torch.tensor([[1, 2], [-1, -1], [-1, -1]]))
    got = Walk()(tree, torch.tensor([[-1, -1, -1], [-1, -1, -1], [7, -1, -1]]))
    assert got.num_emitted.tolist() == [0, 0, 1]
    assert got.num_accepted.tolist() == [0, 0, 0]
    assert got.emitted.tolist() == [[-1, -1, -1], [-1, -1, -1], [7, -1, -1]]


def test_a_node_whose_row_was_cut_before_verification_is_not_accepted():
    got = Walk()(chain(torch.tensor([[1, 2, 3]])), torch.tensor([[1, 2, -1, -1]]))
    assert got.emitted.tolist() == [[1, 2, -1, -1]]
    assert got.num_accepted.tolist() == [1]


def test_the_path_is_as_wide_as_the_depth_bound(rng):
    tree = random_tree(rng, batch=4, nodes=10, vocab=2, chainy=0.0)
    bound = int(tree.depth.max())
    got = Walk()(TokenTree(tree.tokens, tree.parents, bound), draws_by_path(tree, rng, 2))
    assert got.path.shape == (4, bound)
    assert got.emitted.shape == (4, bound + 1)


class LikelyEnough:
    """A lossy rule as a later method may bring it: a node is kept when the target gives it at least this probability."""

    name, lossless, needs_target, coupled, caveat = "likely enough", False, True, False, "is lossy"

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self, tree: TokenTree, drawn: torch.Tensor, target: TargetRows | None = None) -> Acceptance:
        assert target is not None
        above = target.index.gather(1, tree.parents).clamp(min=0)  # the logits line of each node's parent
        chance = target.logits.softmax(-1)[above, tree.tokens.clamp(min=0)]
        return accept_down_to(tree, deepest_reachable(tree, (chance < self.least) | (tree.tokens < 0)), drawn)


def test_a_rule_that_reads_target_probabilities_fits_the_interface():
    rule: AcceptRule = LikelyEnough(0.3)
    tree = TokenTree(torch.tensor([[0, 1, 2, 1]]), torch.tensor([[0, 0, 2, 3]]))
    # Lines in another order than rows, and one of another request between them.
    target = TargetRows(torch.zeros(6, 3), torch.tensor([[5, 3, 4, 0, 1]]))
    target.logits[5] = torch.tensor([0.5, 0.35, 0.15]).log()  # the root: both children will do
    target.logits[4] = torch.tensor([0.1, 0.1, 0.8]).log()
    target.logits[0] = torch.tensor([0.6, 0.2, 0.2]).log()  # node 3's token 1 is too unlikely
    got = rule(tree, torch.tensor([[0, 0, 0, 2, 2]]), target)
    assert got.path[0].tolist() == [2, 3, 0, 0]
    assert got.emitted[0].tolist() == [1, 2, 2, -1, -1]
