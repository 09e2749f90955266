# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tree.naive import random_tree, unpad, walk
from vllm_spec_plugins.tree import TokenTree, Walk, chain


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
