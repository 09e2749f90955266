# SPDX-License-Identifier: Apache-2.0
"""What promises are worth: the kernels count what the compiled loops and the tensor code count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.cases import Cases
from tests.kernels.guarded import Guarded
from tests.unit.tree.naive import random_tree
from vllm_spec_plugins import compiled
from vllm_spec_plugins.kernels import calibration as kernel
from vllm_spec_plugins.tree import Forest, TokenTree
from vllm_spec_plugins.tree.calibration import Calibration

CPU = torch.device("cpu")


def some_forest(rng: torch.Generator, batch: int, sizes: tuple[int, ...], deepest: int) -> Forest:
    trees = []
    for size in sizes:
        tree = random_tree(rng, batch, size, 2)
        shallow = tree.depth[:, 1:] <= deepest
        tokens = tree.tokens.masked_fill(~shallow, -1)  # absent ones may stand anywhere in a forest
        chance = torch.rand(batch, size, generator=rng).double() ** tree.depth[:, 1:]
        trees.append(TokenTree(tokens, tree.parents * shallow, deepest, chance=chance * (tokens >= 0)))
    return Forest.of(trees)


def test_figures_and_factors_are_those_of_the_plain_versions(
    cases: Cases, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in cases(kernel._observe_kernel, kernel._together_kernel, kernel._factors_kernel):
        sizes, deepest = tuple(draw.numbers((1, 3), (1, 11))), draw.number(1, 5)
        requests, batch, memory = draw.number(5, 8), draw.number(1, 5), Guarded(rng)
        looped, plain = (Calibration(requests, sizes, deepest, CPU) for _ in range(2))
        # As if some thousand places had been seen, none of some sources.
        seen = torch.rand(requests + 1, len(sizes), 3, generator=rng).double().sort(2, descending=True).values * 1000
        seen *= torch.rand(requests + 1, len(sizes), 1, generator=rng) < 0.7
        for each in (looped, plain):
            each.counts.copy_(seen)
        names = "tokens", "parents", "odds", "source", "offered_at", "counts"
        ours = {name: memory.holding(getattr(plain, name)) for name in names}
        token_ids = torch.randint(2, (requests, draw.number(18, 21)), generator=rng, dtype=torch.int32)
        forest = some_forest(rng, batch, sizes, deepest)
        slots = torch.randperm(requests, generator=rng)[:batch]
        lengths = torch.randint(8, 18, (batch,), generator=rng)
        emitted = torch.randint(deepest + 3, (batch,), generator=rng)
        at = lengths - emitted - (torch.rand(batch, generator=rng) < 0.2).long()  # some are too late
        step = SimpleNamespace(slots=slots, token_ids=token_ids, lengths=lengths, num_emitted=emitted)
        for name in ("tokens", "parents", "odds"):
            ours[name][slots] = getattr(forest, name)
        ours["offered_at"][slots] = at
        kernel.observe(slots, token_ids, lengths, emitted, *ours.values(), deepest, Calibration.MEMORY)
        out = memory((batch, len(sizes)), torch.float64)
        factors = kernel.factors(slots, ours["counts"], Calibration.PRIOR, Calibration.EXTREME, out)
        for each in (looped, plain):
            monkeypatch.setattr(compiled, "use_loops", each is looped)
            each.offer(slots, at, forest)
            each.observe(step)
            exact = 1e-9 if each is looped else 1e-6  # the tensor code's share that stays is a float32
            torch.testing.assert_close(ours["counts"], each.counts, rtol=exact, atol=exact)
            torch.testing.assert_close(factors, each.factors(slots), rtol=exact, atol=exact)
            assert torch.equal(ours["offered_at"], each.offered_at)
        memory.assert_untouched()


def test_a_promise_that_was_kept_is_seen() -> None:
    """The control: the same step with another token emitted leaves other figures."""
    slot = torch.zeros(1, dtype=torch.int64)
    right = []
    for offered in (7, 6):
        state = Calibration(1, (1,), 1, CPU)
        tree = TokenTree(torch.tensor([[offered]]), slot.view(1, 1), 1, chance=torch.full((1, 1), 0.5))
        state.offer(slot, torch.tensor([4]), Forest.of([tree]))
        offer = state.tokens, state.parents, state.odds, state.source, state.offered_at, state.counts
        token_ids = torch.full((1, 9), 7, dtype=torch.int32)
        kernel.observe(slot, token_ids, torch.tensor([5]), torch.tensor([1]), *offer, 1, Calibration.MEMORY)
        right.append(state.counts[:, 0].tolist())
    assert right == [[[1.0, 0.5, 1.0]] * 2, [[1.0, 0.5, 0.0]] * 2]
