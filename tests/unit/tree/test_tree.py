# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tree.naive import path_to, random_tree
from vllm_spec_plugins.tree import TokenTree, chain


@pytest.mark.parametrize("nodes", [0, 1, 2, 7, 63, 64, 130])
def test_depths_ancestors_words_and_paths_agree_with_climbing_from_parent_to_parent(nodes, rng):
    tree = random_tree(rng, batch=5, nodes=nodes, vocab=4, chainy=0.7)
    tree.validate()
    for b in range(5):
        parents = tree.parents[b].tolist()
        for row in range(nodes + 1):
            climbed = path_to(parents, row)
            assert tree.depth[b, row] == len(climbed)
            assert tree.ancestors()[b, row].nonzero().flatten().tolist() == [0, *climbed]
            words = [word % (1 << 64) for word in tree.ancestor_words()[b, row].tolist()]
            assert sum(word << (64 * k) for k, word in enumerate(words)) == sum(1 << r for r in [0, *climbed])
    rows = torch.randint(nodes + 1, (5,), generator=rng)
    for b, path in enumerate(tree.path(rows).tolist()):
        climbed = path_to(tree.parents[b].tolist(), int(rows[b]))
        assert path == climbed + [0] * (nodes - len(climbed))


def test_a_chain_of_300_nodes_has_exact_ancestors():
    tree = chain(torch.arange(300).unsqueeze(0))
    assert torch.equal(tree.ancestors()[0], torch.ones(301, 301).tril() > 0)


def test_a_depth_bound_narrows_paths_and_leaves_derived_values_as_they_are(rng):
    loose = random_tree(rng, batch=8, nodes=20, vocab=4)
    deepest = int(loose.depth.max())
    tight = TokenTree(loose.tokens, loose.parents, max_depth=deepest)
    assert torch.equal(tight.ancestors(), loose.ancestors())
    rows = torch.randint(21, (8,), generator=rng)
    assert torch.equal(tight.path(rows), loose.path(rows)[:, :deepest])


def test_the_first_nodes_of_a_tree_are_a_tree(rng):
    tree = random_tree(rng, batch=6, nodes=12, vocab=4)
    kept = torch.tensor([0, 1, 3, 7, 12, 20])
    cut = tree.truncate(kept)
    cut.validate()
    assert torch.equal(cut.num_nodes, torch.minimum(tree.num_nodes, kept))
    assert torch.equal(tree.truncate(3).tokens[:, :3], tree.tokens[:, :3])
    assert torch.equal(tree.truncate(3).num_nodes, tree.num_nodes.clamp(max=3))


def test_an_empty_tree_has_no_nodes():
    tree = TokenTree.empty(3, 4, max_depth=2)
    tree.validate()
    assert tree.num_nodes.tolist() == [0, 0, 0]
    assert tree.max_depth == 2


@pytest.mark.parametrize(
    ("tokens", "parents", "max_depth", "complaint"),
    [
        ([1, -1, 2], [0, 0, 0], -1, "at the end"),
        ([1, 2, 3], [0, 3, 0], -1, "before its child"),
        ([1, 2, -1], [0, 1, 2], -1, "parent 0"),
        ([1, 2, 3], [0, 1, 2], 2, "exceeds max_depth"),
        ([1, -2, -1], [0, 0, 0], -1, "below -1"),
    ],
)
def test_validation_names_what_is_wrong(tokens, parents, max_depth, complaint):
    with pytest.raises(ValueError, match=complaint):
        TokenTree(torch.tensor([tokens]), torch.tensor([parents]), max_depth).validate()
