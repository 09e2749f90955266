# SPDX-License-Identifier: Apache-2.0
"""Grown trees: the kernels take the candidates that the compiled loops and the tensor code take, equals included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Cases, Draw
from tests.kernels.guarded import Guarded
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import growth
from vllm_spec_plugins.proposers import loops
from vllm_spec_plugins.proposers.specinfer import _best
from vllm_spec_plugins.tree import TokenTree, from_choices
from vllm_spec_plugins.tree import builders as plain

CPU = torch.device("cpu")


def heads(rng: torch.Generator, batch: int, depth: int, ranks: int, tied: bool) -> tuple[Tensor, Tensor]:
    """Candidates and chances; tied: halves and quarters, so that products of different paths are equal."""
    candidates = torch.randint(1000, (batch, depth, ranks), generator=rng)
    chance = torch.rand(batch, depth, ranks, generator=rng)
    if tied:
        chance = 0.5 ** torch.randint(1, 4, (batch, depth, ranks), generator=rng)
    return candidates, chance


def tree_memory(memory: Guarded, batch: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch, nodes)
    return memory(shape, torch.int64), memory(shape, torch.int64), memory(shape, torch.float32)


def test_the_tree_of_the_heads_is_that_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(growth._ranked_kernel):
        depth, ranks, nodes, memory = draw.number(1, 4), draw.number(1, 8), draw.number(1, 33), Guarded(rng)
        limit, least = draw.one_of(nodes, draw.number(0, nodes)), draw.one_of(0.0, 0.05, 0.125)
        batch = draw.number(1, 3)
        table = plain._products(depth, ranks, nodes, CPU)
        candidates, chance = heads(rng, batch, depth, ranks, draw.flip())
        given = table.ranks, table.depth, table.parent
        found = growth.ranked(candidates, chance, *given, nodes, limit, least, tree_memory(memory, batch, nodes))
        for use_loops in (True, False):
            monkeypatch.setattr(compiled, "use_loops", use_loops)
            expected = plain.ranked(candidates, chance, nodes, limit, least)
            assert torch.equal(found[0], expected.tokens)
            assert torch.equal(found[1], expected.parents)
            torch.testing.assert_close(found[2], expected.chance.float(), rtol=1e-5, atol=0)
        TokenTree(found[0], found[1], min(depth, nodes)).validate()
        memory.assert_untouched()


def some_choices(draw: Draw, nodes: int) -> list[list[int]]:
    """Paths of a tree of `nodes` nodes and at most 4 levels, which need not begin with the best ranks."""
    choices: list[list[int]] = []
    while len(choices) < nodes:
        above = draw.one_of([], *(path for path in choices if len(path) < 4))
        path = [*above, draw.number(0, 9)]
        if path not in choices:
            choices.append(path)
    return choices


def test_a_fixed_tree_is_that_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(growth._ranked_kernel):
        shape, memory = from_choices(some_choices(draw, draw.number(1, 19))), Guarded(rng)
        table = plain._paths_of(shape, CPU)
        batch, limit = draw.number(1, 5), draw.one_of(99, draw.number(0, shape.num_nodes))
        candidates, chance = heads(rng, batch, shape.max_depth, max(shape.ranks) + draw.number(1, 3), False)
        out = tree_memory(memory, batch, shape.num_nodes)
        found = growth.chosen(candidates, chance, table.ranks, table.depth, table.parent, limit, out)
        for use_loops in (True, False):
            monkeypatch.setattr(compiled, "use_loops", use_loops)
            expected = plain.chosen(shape, candidates, chance, limit)
            assert torch.equal(found[0], expected.tokens)
            assert torch.equal(found[1], expected.parents)
            torch.testing.assert_close(found[2], expected.chance.float(), rtol=1e-5, atol=0)
        memory.assert_untouched()


class Looped:
    """A draft's levels in the compiled loops, and the same state for the kernels."""

    def __init__(self, memory: Guarded, batch: int, candidates: int, width: int) -> None:
        whole = {name: torch.zeros(batch, candidates, dtype=torch.int64) for name in ("tokens", "links", "owners")}
        whole["chances"] = torch.zeros(batch, candidates)
        whole |= {name: torch.zeros(batch, dtype=torch.int64) for name in ("start", "count", "rows")}
        whole |= {name: torch.full((batch, width), -1) for name in ("drafted", "parents", "candidate")}
        self.loops = {name: value.numpy() for name, value in whole.items()}
        self.kernels = {name: memory.holding(value) for name, value in whole.items()}

    def some(self, side: str, names: str) -> list:
        return [getattr(self, side)[name] for name in names.split()]

    def assert_equal(self) -> None:
        for name, value in self.kernels.items():
            if name == "chances":
                torch.testing.assert_close(value, torch.from_numpy(self.loops[name]), rtol=1e-5, atol=1e-7)
            elif name == "candidate":  # undefined behind the trees' rows
                there = torch.arange(value.shape[1]) < self.kernels["rows"].unsqueeze(1)
                assert torch.equal(value[there], torch.from_numpy(self.loops[name])[there])
            else:
                assert np.array_equal(value, self.loops[name]), name


def test_levels_of_a_draft_grow_as_in_the_compiled_loops(cases: Cases, rng: torch.Generator) -> None:
    for draw in cases(growth._expand_kernel, growth._adopt_kernel, growth._likeliest_kernel):
        children, tied, memory = draw.numbers((2, 3), (1, 5)), draw.flip(), Guarded(rng)
        expanded = [1, *(draw.number(1, 5) for _ in children[1:])]
        batch, considered, width = draw.number(1, 4), draw.number(max(children), 9), draw.number(1, 12)
        least = draw.one_of(0.0, 0.05, 0.2)
        candidates = sum(rows * count for rows, count in zip(expanded, children, strict=True))
        state = Looped(memory, batch, candidates + draw.number(0, 3), width)
        request, row = np.arange(batch), np.zeros(batch, dtype=np.int64)
        rows = torch.zeros(batch, 1, dtype=torch.int64)
        for level, count in enumerate(children):
            if level:
                names = "chances owners tokens start count", "drafted parents candidate rows"
                most, worth = expanded[level], np.float32(least)
                before, after = (state.some("loops", each) for each in names)
                request, row = loops.expand(*before, most, worth, *after)
                before, after = (state.some("kernels", each) for each in names)
                out = memory((batch, most), torch.int64)
                rows = growth.expand(*before, most, least, *after, out)
                added = rows >= 0
                assert np.array_equal(added.nonzero()[:, 0], request)
                assert np.array_equal(rows[added], row)
            scores = torch.randn(rows.numel(), considered, generator=rng) * 2
            if tied:  # powers of two as chances, before they are made to add up to 1
                scores = scores.round() * float(np.log(2))
            scores = scores.sort(1, descending=True).values
            found = torch.randint(999, (rows.numel(), considered), generator=rng)
            present = rows.flatten() >= 0
            names = "candidate chances owners tokens links count"
            given = found[present].numpy(), scores[present].numpy(), count
            loops.adopt(request, row, *given, *state.some("loops", names))
            growth.adopt(rows, found, scores, count, *state.some("kernels", names))
            state.assert_equal()
            # From here on the loops' chances for both: the last bit of a softmax must not decide.
            state.kernels["chances"].copy_(torch.from_numpy(state.loops["chances"]))
        _assert_same_choice(draw, memory, state, least)
        memory.assert_untouched()


def _assert_same_choice(draw: Draw, memory: Guarded, state: Looped, least: float) -> None:
    names = "tokens links chances count"
    batch, many = state.kernels["tokens"].shape
    nodes = draw.number(1, many + 3)
    limit = draw.one_of(many, draw.number(0, nodes))
    out = *tree_memory(memory, batch, nodes), memory((batch, nodes), torch.int64)
    found = growth.likeliest_nodes(*state.some("kernels", names), nodes, limit, least, out)
    expected = loops.likeliest_nodes(*state.some("loops", names), nodes, limit, np.float32(least))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)
    # Absent candidates have no chance in the tensors' layout.
    there = torch.arange(many) < state.kernels["count"].unsqueeze(1)
    tokens, links, chances, _ = state.some("kernels", names)
    tree = _best(tokens, links, chances * there, None, nodes, min(limit, nodes), least, nodes)
    assert torch.equal(found[0], tree.tokens)
    assert torch.equal(found[1], tree.parents)
    assert torch.equal(found[2], tree.chance)


def test_rows_whose_answer_is_not_good_have_no_children(rng: torch.Generator) -> None:
    state = Looped(Guarded(rng), 1, 6, 4)
    rows = torch.tensor([[-1, 0, -1]])
    scores = torch.zeros(3, 4)
    found = torch.arange(12).view(3, 4)
    growth.adopt(rows, found, scores, 3, *state.some("kernels", "candidate chances owners tokens links count"))
    assert state.kernels["tokens"].tolist() == [[4, 5, 6, 0, 0, 0]]
    assert state.kernels["chances"].tolist() == [[0.25, 0.25, 0.25, 0, 0, 0]]
    assert state.kernels["count"].tolist() == [3]


def test_other_chances_make_another_tree(rng: torch.Generator) -> None:
    """The control: the budget goes to the likeliest paths."""
    table = plain._products(2, 2, 4, CPU)
    candidates = torch.arange(4).view(1, 2, 2)
    given = table.ranks, table.depth, table.parent
    wide = growth.ranked(candidates, torch.tensor([[[0.5, 0.5], [0.1, 0.1]]]), *given, 2, 2, 0.0)
    deep = growth.ranked(candidates, torch.tensor([[[0.5, 0.1], [0.9, 0.1]]]), *given, 2, 2, 0.0)
    assert wide[1].tolist() == [[0, 0]]
    assert deep[1].tolist() == [[0, 1]]
