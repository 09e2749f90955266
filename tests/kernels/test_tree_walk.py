# SPDX-License-Identifier: Apache-2.0
"""The walk as a kernel, against its reference and against the rule as loops and as tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Cases
from tests.kernels.guarded import guards_hold, poisoned
from tests.unit.tree.naive import random_tree
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import tree_walk as module
from vllm_spec_plugins.kernels.tree_walk import MOST_NODES, Walked, tree_walk, tree_walk_reference
from vllm_spec_plugins.tree import TokenTree, Walk, accept_down_to, chain, deepest_reachable


def draws(tree: TokenTree, rng: torch.Generator, vocab: int) -> Tensor:
    """[B, N + 1]: mostly the token of some child; rows of absent nodes, and from some row on of some requests, are absent."""
    batch, rows = tree.depth.shape
    drawn = torch.randint(vocab, (batch, rows), generator=rng)
    for node in range(rows - 1):
        followed = (torch.rand(batch, generator=rng) < 0.6) & (tree.tokens[:, node] >= 0)
        index = tree.parents[:, node : node + 1]
        drawn.scatter_(1, index, tree.tokens[:, node : node + 1].where(followed.unsqueeze(1), drawn.gather(1, index)))
    drawn[:, 1:].masked_fill_(tree.tokens < 0, -1)
    cut = torch.randint(4 * rows, (batch,), generator=rng)
    cut.masked_fill_(torch.rand(batch, generator=rng) < 0.1, 0)  # a request without any draw
    return drawn.masked_fill(torch.arange(rows) >= cut.unsqueeze(1), -1)


def results(batch: int, depth: int, rng: torch.Generator) -> Walked:
    path, count, emitted, emits = (
        poisoned(shape, torch.int64, rng) for shape in ((batch, depth), (batch,), (batch, depth + 1), (batch,))
    )
    return path, count, emitted, emits


def same(got: Walked, expected: Walked) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def by_rule(tree: TokenTree, drawn: Tensor, loops: bool, monkeypatch: pytest.MonkeyPatch) -> Walked:
    monkeypatch.setattr(compiled, "use_loops", loops)
    found = Walk()(TokenTree(tree.tokens, tree.parents, tree.max_depth), drawn)
    return found.path, found.num_accepted, found.emitted, found.num_emitted


def test_random_trees_are_walked_as_the_rule_walks_them(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(module.tree_walk_kernel):
        # Around the sizes where a block gets larger, too.
        nodes = draw.one_of(draw.number(0, 40), draw.number(0, 255), draw.one_of(31, 32, 63, 64, 127, 254))
        batch, (vocab, chainy) = draw.number(1, 8), draw.one_of((1, 0.1), (2, 0.5), (7, 0.9))
        tree = random_tree(rng, batch, nodes, vocab, chainy)
        bound = draw.one_of(nodes, int(tree.depth.max()), nodes + 3)
        tree = TokenTree(tree.tokens, tree.parents, bound)
        drawn = draws(tree, rng, vocab)
        out = results(batch, tree.max_depth, rng)
        got = tree_walk(tree.tokens, tree.parents, drawn, tree.max_depth, out=out)
        assert all(a is b for a, b in zip(got, out, strict=True))
        assert all(map(guards_hold, out))
        assert same(got, tree_walk_reference(tree.tokens, tree.parents, drawn, tree.max_depth))
        assert same(got, by_rule(tree, drawn, True, monkeypatch))
        assert same(got, by_rule(tree, drawn, False, monkeypatch))


def test_the_random_trees_have_what_makes_a_walk_hard(rng: torch.Generator) -> None:
    """Long paths, an end among duplicates, rows cut before verification, requests without a draw."""
    deep = cut = doubled = silent = 0
    for _ in range(20):
        tree = random_tree(rng, 8, 40, 2, 0.5)
        drawn = draws(tree, rng, 2)
        path, count, _, emits = tree_walk_reference(tree.tokens, tree.parents, drawn, 40)
        last = (path.gather(1, (count - 1).clamp(min=0).unsqueeze(1)) - 1).clamp(min=0)
        twin = (tree.parents == tree.parents.gather(1, last)) & (tree.tokens == tree.tokens.gather(1, last))
        deep += int((count > 4).sum())
        doubled += int(((twin.sum(1) > 1) & (count > 0)).sum())
        cut += int(((tree.tokens >= 0) & (drawn[:, 1:] < 0)).any(1).sum())
        silent += int((emits == 0).sum())
    assert min(deep, doubled, cut, silent) > 0, (deep, doubled, cut, silent)


def test_nodes_that_a_rule_refuses_end_the_paths_as_its_own_code_ends_them(cases: Cases, rng: torch.Generator) -> None:
    for draw in cases(module.tree_walk_kernel):
        nodes = draw.one_of(draw.number(0, 20), draw.number(0, 130))
        batch, refused = draw.number(1, 6), draw.one_of(0.0, 0.2, 0.9)
        tree = random_tree(rng, batch, nodes, 3, 0.5)
        drawn = torch.randint(-1, 3, (batch, nodes + 1), generator=rng)
        wrong = (torch.rand(batch, nodes, generator=rng) < refused) | (tree.tokens < 0)
        found = accept_down_to(tree, deepest_reachable(tree, wrong), drawn)
        out = results(batch, tree.max_depth, rng)
        got = tree_walk(tree.tokens, tree.parents, drawn, tree.max_depth, wrong, out)
        assert all(map(guards_hold, out))
        assert same(got, (found.path, found.num_accepted, found.emitted, found.num_emitted))
        assert same(got, tree_walk_reference(tree.tokens, tree.parents, drawn, tree.max_depth, wrong))


def test_rows_of_wider_tensors_and_one_tree_for_all_are_read_where_they_stand(rng: torch.Generator) -> None:
    tokens = torch.randint(2, (6, 40), generator=rng)[:, 5:22]
    parents = torch.cat([random_tree(rng, 1, 17, 2).parents, torch.zeros(1, 3, dtype=torch.int64)], 1)[:, :17]
    drawn = torch.randint(2, (6, 50), generator=rng)[:, 3:21]
    got = tree_walk(tokens, parents.expand(6, -1), drawn, 17)
    assert same(got, tree_walk_reference(tokens.clone(), parents.repeat(6, 1), drawn.clone(), 17))


def test_the_largest_tree_is_a_chain_to_its_end() -> None:
    tree = chain(torch.arange(MOST_NODES).unsqueeze(0))
    drawn = torch.arange(MOST_NODES + 1).unsqueeze(0)
    path, count, emitted, emits = tree_walk(tree.tokens, tree.parents, drawn, MOST_NODES)
    assert path[0].tolist() == list(range(1, MOST_NODES + 1))
    assert (int(count), int(emits)) == (MOST_NODES, MOST_NODES + 1)
    assert emitted[0].tolist() == list(range(MOST_NODES + 1))
    # One wrong node at the top outweighs all the right ones below it; all of them wrong still fit the sum.
    wrong = torch.zeros(1, MOST_NODES, dtype=torch.bool)
    wrong[0, 0] = True
    assert int(tree_walk(tree.tokens, tree.parents, drawn, MOST_NODES, wrong)[1]) == 0
    assert int(tree_walk(tree.tokens, tree.parents, drawn, MOST_NODES, torch.ones_like(wrong))[1]) == 0


def test_no_request_is_no_launch() -> None:
    none = torch.empty(0, 4, dtype=torch.int64)
    path, count, emitted, emits = tree_walk(none, none, torch.empty(0, 5, dtype=torch.int64), 4)
    assert (path.shape, count.shape, emitted.shape, emits.shape) == ((0, 4), (0,), (0, 5), (0,))


def test_layouts_that_the_kernel_cannot_read_are_refused() -> None:
    tokens, parents = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    drawn = torch.zeros(2, 5, dtype=torch.int64)
    for broken in (
        (tokens.int(), parents, drawn),
        (tokens, parents[:, :3], drawn),
        (tokens, parents, drawn[:, :4]),
        (tokens, torch.zeros(4, 2, dtype=torch.int64).T, drawn),
    ):
        with pytest.raises(AssertionError):
            tree_walk(*broken, 4)
    wide = torch.zeros(1, MOST_NODES + 1, dtype=torch.int64)
    with pytest.raises(AssertionError, match="1024 nodes"):
        tree_walk(wide, wide, torch.zeros(1, MOST_NODES + 2, dtype=torch.int64), 4)


def test_the_comparison_notices_another_tree(rng: torch.Generator) -> None:
    """A control: parents that are off by one row give other paths."""
    tree = random_tree(rng, 16, 30, 1, 0.3)
    drawn = torch.zeros(16, 31, dtype=torch.int64)
    got = tree_walk(tree.tokens, (tree.parents - 1).clamp(min=0), drawn, 30)
    assert not same(got, tree_walk_reference(tree.tokens, tree.parents, drawn, 30))
