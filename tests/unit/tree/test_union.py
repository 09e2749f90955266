# SPDX-License-Identifier: Apache-2.0
"""Trees of several sources as one: shared paths, pooled chances, the best nodes under a budget."""

import pytest
import torch

from tests.unit.tree.naive import paths, random_tree, united
from vllm_spec_plugins import compiled
from vllm_spec_plugins.tree import Forest, TokenTree, chain, trie, union
from vllm_spec_plugins.tree.builders import ranked


def with_chances(rng, tree):
    """Random path chances that fall along every path; the children of a node share less than certainty."""
    batch, nodes = tree.tokens.shape
    given = torch.rand(batch, nodes, generator=rng).double()
    chance = torch.zeros(batch, nodes, dtype=torch.float64)
    for b in range(batch):
        parents = tree.parents[b].tolist()
        for node in range(int(tree.num_nodes[b])):
            brothers = sum(float(given[b, other]) for other in range(nodes) if parents[other] == parents[node])
            above = float(chance[b, parents[node] - 1]) if parents[node] else 1.0
            chance[b, node] = above * float(given[b, node]) * 0.9 / max(brothers, 1.0)
    return TokenTree(tree.tokens, tree.parents, tree.max_depth, chance=chance)


def random_trees(rng, batch, sizes, vocab=3):
    return [with_chances(rng, random_tree(rng, batch, size, vocab)) for size in sizes]


def chances(tree, request):
    """Chance by path."""
    names = paths(tree, request)
    return dict(zip(names, tree.chance[request, : len(names)].tolist(), strict=True))


@pytest.mark.parametrize("sizes", [(6,), (1, 1), (8, 5), (4, 9, 6), (16, 16)])
def test_the_union_is_the_best_tree_of_what_the_sources_say_together(sizes, rng):
    batch = 10
    for _ in range(4):
        trees = random_trees(rng, batch, sizes)
        weights = torch.rand(batch, len(sizes), generator=rng).double() * 4
        for nodes, limit, least in [(sum(sizes), None, 0.0), (7, None, 0.05), (12, 3, 0.0), (5, 0, 0.0)]:
            found = union(Forest.of(trees), weights, nodes, limit, least)
            found.validate()
            assert found.tokens.shape == (batch, nodes)
            for b in range(batch):
                expected = united(trees, weights[b].tolist(), b)
                best = sorted((p for p in expected if expected[p] >= least), key=lambda p: -expected[p])
                best = best[: nodes if limit is None else min(limit, nodes)]
                kept = chances(found, b)
                assert set(kept) == set(best)
                assert len(kept) == int(found.num_nodes[b])
                assert kept == pytest.approx({path: expected[path] for path in best})
                assert float(found.gain[b]) == pytest.approx(sum(kept.values()))
                assert not found.chance[b, len(best) :].any()


def test_loops_and_tensor_code_make_the_same_trees_to_the_last_node(rng, monkeypatch):
    for sizes in [(9, 9), (3, 14, 5)]:
        trees = random_trees(rng, 16, sizes, vocab=4)
        weights = torch.rand(16, len(sizes), generator=rng).double() * 3
        found = []
        for loops in (True, False):
            monkeypatch.setattr(compiled, "use_loops", loops)
            found.append(union(Forest.of(trees), weights, 12, 11, 0.01))
        assert torch.equal(found[0].tokens, found[1].tokens)
        assert torch.equal(found[0].parents, found[1].parents)
        assert torch.allclose(found[0].chance, found[1].chance)


def test_a_source_alone_gets_back_the_chances_that_it_gave(rng):
    odds = torch.rand(6, 4, 5, generator=rng) * 3
    tree = trie(torch.randint(3, (6, 4, 5), generator=rng), 20, None, odds)
    silent = TokenTree.empty(6, 4)
    found = union(Forest.of([silent, tree]), torch.ones(6, 2).double(), 20)
    assert torch.equal(found.tokens, tree.tokens)
    assert torch.equal(found.parents, tree.parents)
    assert torch.allclose(found.chance, tree.chance.double())


def test_agreement_raises_a_chance_and_rivals_lower_each_others():
    def source(token, chance):
        return TokenTree(torch.tensor([[token]]), torch.tensor([[0]]), chance=torch.tensor([[chance]]))

    even = torch.ones(1, 2).double()
    agreeing = union(Forest.of([source(5, 0.5), source(5, 0.5)]), even, 2)
    assert agreeing.chance.tolist() == [[pytest.approx(2 / 3), 0.0]]
    rivals = union(Forest.of([source(5, 0.5), source(6, 0.5)]), even, 2)
    assert rivals.chance.tolist() == [[pytest.approx(1 / 3)] * 2]
    believed = union(Forest.of([source(5, 0.5), source(6, 0.5)]), torch.tensor([[1.0, 4.0]]).double(), 2)
    assert believed.chance.tolist() == [[pytest.approx(1 / 6), pytest.approx(4 / 6)]]


def test_the_same_token_at_the_same_depth_under_another_parent_is_another_node():
    first, second = chain(torch.tensor([[1, 7]])), chain(torch.tensor([[2, 7]]))
    found = union(Forest.of([first, second]), torch.ones(1, 2).double(), 8)
    assert paths(found) == [(1,), (1, 7), (2,), (2, 7)]
    shared = union(Forest.of([first, chain(torch.tensor([[1, 7]]))]), torch.ones(1, 2).double(), 8)
    assert paths(shared) == [(1,), (1, 7)]


def test_a_source_without_chances_counts_as_a_coin_per_token():
    found = union(Forest.of([chain(torch.tensor([[1, 2, 3], [4, -1, -1]]))]), torch.ones(2, 1).double(), 3)
    assert found.chance[0].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert found.chance[1].tolist() == pytest.approx([0.5, 0.0, 0.0])


def test_certain_and_impossible_nodes_still_give_trees():
    tokens, parents = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 0, 3]])
    for chance in ([1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0, 0.0, 1.0, 1.0]):
        tree = TokenTree(tokens, parents, chance=torch.tensor([chance]))
        found = union(Forest.of([tree, tree]), torch.full((1, 2), 100.0).double(), 3)
        found.validate()
        assert found.num_nodes.tolist() == [3]
        assert float(found.chance.max()) <= 1.0


def test_every_builder_says_what_each_node_is_worth(rng):
    ngrams, odds = torch.randint(3, (5, 3, 4), generator=rng), torch.rand(5, 3, 4, generator=rng)
    candidates = torch.stack([torch.randperm(99, generator=rng)[:12] for _ in range(5)]).view(5, 3, 4)
    falling = torch.rand(5, 3, 4, generator=rng).sort(2, descending=True).values
    for tree in (trie(ngrams, 8, 6, odds, 0.01), ranked(candidates, falling, 8, 6, 0.01)):
        assert tree.chance.shape == tree.tokens.shape
        assert torch.allclose(tree.gain, tree.chance.sum(1))
        for b in range(5):
            for node in range(8):
                if tree.tokens[b, node] < 0:
                    assert tree.chance[b, node] == 0
                elif tree.parents[b, node] > 0:
                    assert tree.chance[b, node] <= tree.chance[b, tree.parents[b, node] - 1]
                assert tree.tokens[b, node] < 0 or tree.chance[b, node] >= 0.01
        cut = tree.truncate(torch.tensor([0, 1, 2, 3, 8]))
        assert torch.allclose(cut.gain, cut.chance.sum(1), atol=1e-6)
