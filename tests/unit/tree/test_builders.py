# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tree.naive import paths
from vllm_spec_plugins.tree import append, chain, chain_topology, from_choices, lookahead_window, trie, widths


def prefixes(ngrams):
    """Distinct prefixes in n-gram-major order: what a trie of unlimited size must hold."""
    seen = []
    for ngram in ngrams:
        real = [token for token in ngram if token >= 0]
        seen += [tuple(real[: n + 1]) for n in range(len(real)) if tuple(real[: n + 1]) not in seen]
    return seen


def random_ngrams(rng, batch, count, length):
    ngrams = torch.randint(3, (batch, count, length), generator=rng)
    short = torch.randint(length + 1, (batch, count, 1), generator=rng)
    return ngrams.masked_fill(torch.arange(length) >= short, -1)


def test_a_trie_holds_every_distinct_prefix_once_and_in_order(rng):
    for count, length in [(1, 1), (1, 6), (7, 1), (7, 4), (16, 8)]:
        ngrams = random_ngrams(rng, 20, count, length)
        tree = trie(ngrams, count * length)
        tree.validate()
        for b in range(20):
            assert paths(tree, b) == prefixes(ngrams[b].tolist())


def test_a_trie_over_its_budget_keeps_the_first_ngrams(rng):
    ngrams = random_ngrams(rng, 20, 6, 4)
    for nodes, limit in [(5, None), (1, None), (9, 4), (9, 0)]:
        tree = trie(ngrams, nodes, limit)
        tree.validate()
        assert tree.tokens.shape == (20, nodes)
        for b in range(20):
            assert paths(tree, b) == prefixes(ngrams[b].tolist())[: nodes if limit is None else limit]


def test_a_chain_may_be_shorter_than_its_shape():
    tree = chain(torch.tensor([[4, 5, -1], [7, 8, 9], [-1, -1, -1]]))
    tree.validate()
    assert [paths(tree, b) for b in range(3)] == [[(4,), (4, 5)], [(7,), (7, 8), (7, 8, 9)], []]


def test_an_expansion_vector_gives_every_node_of_a_level_as_many_children():
    shape = widths([2, 1, 3])
    assert shape.parents == (0, 0, 1, 2, 3, 3, 3, 4, 4, 4)
    assert shape.ranks == (0, 1, 0, 0, 0, 1, 2, 0, 1, 2)
    assert shape.depths == (1, 1, 2, 2, 3, 3, 3, 3, 3, 3)
    assert widths([1, 1, 1]) == chain_topology(3)
    with pytest.raises(ValueError, match="positive"):
        widths([2, 0])


def test_medusa_choices_in_any_order_become_an_ancestors_first_tree():
    shape = from_choices([[0, 2], [1], [0], [0, 0, 0], [0, 0]])
    assert shape.parents == (0, 1, 0, 1, 4)
    assert shape.ranks == (0, 2, 1, 0, 0)
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        from_choices([[0], [3, 1]])


@pytest.mark.parametrize(("window", "ngram"), [(1, 2), (1, 4), (5, 2), (4, 3), (7, 5)])
def test_a_window_cell_sees_row_0_up_to_its_column_and_its_column_down_to_itself(window, ngram):
    shape = lookahead_window(window, ngram)
    assert shape.num_nodes == window * (ngram - 1) - 1
    tree = shape.tree(torch.arange(shape.num_nodes).unsqueeze(0))
    tree.validate()
    for r in range(ngram - 1):
        for i in range(window):
            seen = set(range(i + 1)) | {k * window + i for k in range(r + 1)}
            assert set(tree.ancestors()[0, r * window + i].nonzero().flatten().tolist()) == seen
            assert tree.depth[0, r * window + i] == r + i


def test_trees_of_a_topology_share_derived_values_that_equal_the_computed_ones(rng):
    shape = widths([3, 2, 2])
    tokens = torch.randint(9, (4, shape.num_nodes), generator=rng)
    tree = shape.tree(tokens)
    computed = chain(tokens).__class__(tokens, tree.parents)
    assert torch.equal(tree.ancestors(), computed.ancestors())
    assert torch.equal(tree.ancestor_words(), computed.ancestor_words())
    assert torch.equal(tree.depth, computed.depth)
    assert tree.ancestors().data_ptr() == shape.tree(tokens[:1]).ancestors().data_ptr()


def test_a_second_part_hangs_below_the_same_root_right_behind_the_first(rng):
    window = lookahead_window(3, 4)
    ngrams = random_ngrams(rng, 20, 4, 3)
    tokens = torch.randint(10, 20, (20, window.num_nodes), generator=rng)
    tokens[5:, 5:] = -1  # two of its three rows
    tokens[10:] = -1
    first = trie(ngrams, 9)
    both = append(first, tokens, torch.tensor(window.parents), window.max_depth)
    both.validate()
    assert both.tokens.shape == (20, 9 + window.num_nodes)
    for b in range(20):
        assert paths(both, b) == paths(first, b) + paths(window.tree(tokens), b)


def test_a_trie_with_odds_is_the_best_tree_under_its_budget(rng):
    for _ in range(10):
        ngrams = random_ngrams(rng, 8, 5, 4)
        odds = torch.rand(8, 5, 4, generator=rng) * 3
        for nodes, limit, least in [(20, None, 0.0), (20, None, 0.1), (6, None, 0.0), (20, 6, 0.05), (20, 0, 0.0)]:
            tree = trie(ngrams, nodes, limit, odds, least)
            tree.validate()
            for b in range(8):
                chance = path_chances(ngrams[b].tolist(), odds[b].tolist())
                worth = sorted((path for path in chance if chance[path] >= least), key=chance.get, reverse=True)
                assert set(paths(tree, b)) == set(worth[: nodes if limit is None else limit])


def path_chances(ngrams, odds):
    """Chance of every distinct prefix: the product of its tokens' shares of the odds."""
    chance = {(): 1.0}
    for path in prefixes(ngrams):
        depth = len(path) - 1
        here = [
            (ngram[depth], odd[depth])
            for ngram, odd in zip(ngrams, odds, strict=True)
            if tuple(ngram[:depth]) == path[:-1] and ngram[depth] >= 0
        ]
        agree = sum(odd for token, odd in here if token == path[-1])
        chance[path] = chance[path[:-1]] * agree / (1 + sum(odd for _, odd in here))
    del chance[()]
    return chance
