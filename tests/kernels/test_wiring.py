# SPDX-License-Identifier: Apache-2.0
"""Where the package asks for a kernel it gets what its loops, or its tensor code, would have answered."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from tests.no_sync import DEVICE, Synchronised, device, no_sync, on_device, on_host
from tests.unit.proposers.simulate import MarkovTarget, from_next_token, simulate
from tests.unit.proposers.test_specinfer import PathModel, context, deferring
from tests.unit.test_on_device import RULES, SLOTS, VOCAB, WIDTH, make, random_trees
from vllm_spec_plugins import compiled
from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.proposers.mixture import MixtureProposer
from vllm_spec_plugins.proposers.specinfer import SpecInferProposer
from vllm_spec_plugins.tree.accept import TargetRows

CPU = torch.device("cpu")


def lane(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(compiled, "use_loops", name == "loops")
    monkeypatch.setattr(compiled, "use_kernels", name == "kernels")


def test_loops_come_first_and_kernels_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.zeros(1)
    for name, expected in (("loops", (True, False)), ("kernels", (False, True)), ("tensors", (False, False))):
        lane(monkeypatch, name)
        assert (loops_for(here), kernels_for(here)) == expected
        assert (loops_for(here.to("meta")), kernels_for(here.to("meta"))) == (False, False)


# Chances are float64 in the loops and in the kernels of tries, which the tensor code has in float32; a draft's are the tensor
# code's.
POOLED = {"history.history_guesses", "trie.trie", "ngram_pool.lookup", "ngram_pool.insert", "window.advance"}
RANKED = {"ranks.judge", "ranks.rank_chances"}
GROWN = {"growth.expand", "growth.adopt", "growth.likeliest_nodes"}
UNITED = {"union.forest_odds", "union.union", "calibration.observe", "calibration.factors"}
PROPOSERS = {
    "window": ("loops", POOLED),
    "medusa": ("loops", {"growth.ranked", *RANKED}),
    "medusa choices": ("loops", {"growth.chosen", *RANKED}),
    "specinfer": ("tensors", GROWN),
    "specinfer widths": ("tensors", GROWN),
    "mix": ("loops", {*POOLED, "growth.ranked", *RANKED, *UNITED}),
}
ASKED = set().union(*(asked for _, asked in PROPOSERS.values()))


def proposer_of(name: str, at: torch.device, bigrams: torch.Tensor, table: torch.Tensor) -> Any:
    if name != "mix":
        return make(name, at, bigrams, table)
    sources = [make(each, at, bigrams, table) for each in ("window", "medusa")]
    return MixtureProposer(sources, max_requests=SLOTS, device=at, min_chance=0.0)


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_proposer_makes_the_same_trees_with_kernels(
    name: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, expected = PROPOSERS[name]
    seed = int(torch.randint(1 << 30, (1,), generator=rng))
    bigrams, table = (torch.randn(VOCAB, width, generator=rng) for width in (VOCAB, WIDTH))
    prompts = [torch.randint(VOCAB, (9 + 3 * k,), generator=rng).tolist() for k in range(2)]
    target = from_next_token(MarkovTarget(VOCAB, 1, 0.0, seed))

    def run(which: str) -> Any:
        lane(monkeypatch, which)
        proposer = proposer_of(name, CPU, bigrams, table)
        own = torch.Generator().manual_seed(seed)
        return simulate(proposer, target, prompts, max_new=5, slots=SLOTS, rng=own, chunks=2, cut=0.1, vocab=VOCAB)

    asked: set[str] = set()
    plain = run(other)
    watch(asked, monkeypatch)
    found = run("kernels")
    assert asked == expected
    assert found.proposed == plain.proposed and found.outputs == plain.outputs
    assert any(len(tree) > 1 for trees in plain.proposed for tree in trees)


def watch(asked: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes in `asked` which functions of ASKED are called."""
    for name in ASKED:
        module, function = name.split(".")
        original = getattr(importlib.import_module(f"vllm_spec_plugins.kernels.{module}"), function)

        def noted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            asked.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(f"vllm_spec_plugins.kernels.{module}.{function}", noted)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_draft_that_costs_stops_and_is_trusted_grows_the_same_with_kernels(
    fixed: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an exit policy keeps, what a level costs, how sure a cascade's draft is: all of it reaches the trees."""
    grown = {"nodes": 17, "depth": 4, "ranks": 3, "min_chance": 0.01}
    shape: dict[str, Any] = {"widths": (3, 2, 2)} if fixed else grown
    sizes = set()
    for cost, keeps, stands in (
        (0.0, None, None),
        (0.3, None, None),
        (0.1, lambda b, path: b != 1 and sum(path) % 3 != 1, None),
        (0.0, lambda b, path: sum(path) % 2 == 0, lambda confidence, request: confidence * 0.7),
    ):
        trees, asked = [], []
        for which in ("tensors", "kernels"):
            lane(monkeypatch, which)
            draft = PathModel(seed, cost=cost)
            draft.keeps = keeps
            step = replace(context(3), deferring=None if stands is None else deferring(stands))
            trees.append(SpecInferProposer(draft, **shape).propose(step))
            asked.append({(b, path) for b, _, path in draft.asked})
        plain, found = trees
        found.validate()
        assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.parents, plain.parents)
        torch.testing.assert_close(found.chance, plain.chance, rtol=1e-5, atol=1e-7)
        assert asked[0] == asked[1]
        sizes.add(tuple(found.num_nodes.tolist()))
        if stands is not None:
            there = found.tokens >= 0
            torch.testing.assert_close(found.confidence[there], plain.confidence[there], rtol=1e-5, atol=1e-7)
    assert len(sizes) > 2 - fixed


class OnDevice:
    """A proposer on tensors in disguise. The first call makes what is made once."""

    def __init__(self, proposer: Any) -> None:
        self.proposer, self.calls = proposer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proposer, name)

    def propose(self, ctx: Any) -> Any:
        self.calls += 1
        given = on_device(ctx)
        with no_sync() if self.calls > 1 else nullcontext():
            return on_host(self.proposer.propose(given))


def kernels_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels answer for tensors in disguise, and are launched on what is behind them."""
    launch = GridExecutor.__call__

    def undisguised(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(self, *map(on_host, args), **{key: on_host(each) for key, each in kwargs.items()})

    monkeypatch.setattr(GridExecutor, "__call__", undisguised)
    for module in [module for key, module in sys.modules.items() if key.startswith("vllm_spec_plugins.")]:
        if hasattr(module, "kernels_for"):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: tensor.device in (CPU, DEVICE))


@pytest.mark.parametrize("name", ["specinfer", "mix"])
def test_what_stands_around_the_kernels_does_not_make_the_host_wait(
    name: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(torch.randint(1 << 30, (1,), generator=rng))
    bigrams, table = (torch.randn(VOCAB, width, generator=rng) for width in (VOCAB, WIDTH))
    prompts = [torch.randint(VOCAB, (9,), generator=rng).tolist()]
    target = from_next_token(MarkovTarget(VOCAB, 1, 0.0, seed))

    def run(proposer: Any) -> Any:
        own = torch.Generator().manual_seed(seed)
        return simulate(proposer, target, prompts, max_new=3, slots=SLOTS, rng=own, chunks=2, cut=0.1, vocab=VOCAB)

    lane(monkeypatch, "kernels")
    expected = run(proposer_of(name, CPU, bigrams, table))
    kernels_on_the_device(monkeypatch)
    asked: set[str] = set()
    watch(asked, monkeypatch)
    with torch.inference_mode(), device():
        there = OnDevice(proposer_of(name, DEVICE, bigrams, table))
        found = run(there)
    assert there.calls > 1 and asked == PROPOSERS[name][1]
    assert found.proposed == expected.proposed


def test_a_step_between_kernels_that_asks_the_device_is_seen(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    from vllm_spec_plugins.kernels import growth

    kernels_on_the_device(monkeypatch)
    adopt = growth.adopt
    monkeypatch.setattr(growth, "adopt", lambda row, *rest: adopt(row, *rest) if row.max().item() >= 0 else None)
    bigrams = torch.randn(VOCAB, VOCAB, generator=rng)
    with torch.inference_mode(), device():
        proposer = make("specinfer", DEVICE, bigrams, bigrams)
        step = on_device(context(2))
        proposer.propose(step)
        with pytest.raises(Synchronised), no_sync():
            proposer.propose(step)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_accepts_the_same_with_kernels(name: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rule: Any = RULES[name]()
    accepted = 0
    for batch, nodes in ((1, 1), (3, 5), (4, 9), (2, 17)):
        tree = random_trees(batch, nodes, rng)
        rows = torch.arange(nodes + 1).expand(batch, -1)
        index = (torch.arange(batch).unsqueeze(1) * (nodes + 1) + rows).where(rows <= tree.num_nodes.unsqueeze(1), -1)
        drawn = torch.randint(3, (batch, nodes + 1), generator=rng).where(index >= 0, -1)
        target = TargetRows(torch.randn(batch * (nodes + 1), 5, generator=rng), index, torch.arange(batch) % 2 == 0)
        lane(monkeypatch, "tensors")
        expected = rule(tree, drawn, target)
        lane(monkeypatch, "kernels")
        found = rule(tree, drawn, target)
        for each in ("path", "num_accepted", "emitted", "num_emitted"):
            assert torch.equal(getattr(found, each), getattr(expected, each)), each
        accepted += int(expected.num_accepted.sum())
    assert accepted > 0


def test_candidates_are_ranked_the_same_with_kernels(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine.sampler import likeliest

    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3])
    seeds = torch.randint(1 << 60, (4,), generator=rng)
    states: Any = SimpleNamespace(
        temperature=SimpleNamespace(gpu=temperature, np=temperature.numpy()),
        seeds=SimpleNamespace(gpu=seeds, np=seeds.numpy()),
        apply_temperature=lambda logits, rows, _: logits.div_(
            temperature[rows.long()].where(temperature[rows.long()] > 0, 1.0).unsqueeze(1)
        ),
        apply_min_p=lambda *_: None,
        apply_top_k_top_p=lambda logits, *_: logits,
    )
    for coupled in (True, False):
        logits = torch.randn(6, 211, generator=rng)
        rows = torch.tensor([1, 0, 3, 3, 2, 1], dtype=torch.int32)
        position = torch.randint(1000, (6,), generator=rng)
        answers = []
        for which in ("loops", "kernels"):
            lane(monkeypatch, which)
            answers.append(likeliest(states, coupled, logits.clone(), rows, np.arange(4), position, 5))
        assert torch.equal(answers[0][0], answers[1][0])
        torch.testing.assert_close(answers[0][1], answers[1][1], rtol=1e-5, atol=1e-5)


def test_paths_are_committed_with_kernels(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine.kv import PathCommit

    size = 16
    # Two geometries in one group: a launch each.
    caches = [torch.randn(8, heads, size, 12, generator=rng) for heads in (2, 2, 3)]
    before = [cache.clone() for cache in caches]
    table = torch.zeros(5, 3, dtype=torch.int32)
    table[3], table[1] = torch.tensor([4, 2, 6]), torch.tensor([1, 3, 5])
    slots, root = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([14, 5])
    path, accepted = torch.tensor([[2, 3, 5], [0, 0, 0]]), torch.tensor([3, 0])
    lane(monkeypatch, "kernels")
    PathCommit(caches, size)(table, slots, root, path, accepted)
    for cache, old in zip(caches, before, strict=True):
        expected = old.clone()
        for source, target in ((16, 15), (17, 16), (19, 17)):
            expected[table[3, target // size].long(), :, target % size] = old[
                table[3, source // size].long(), :, source % size
            ]
        assert torch.equal(cache, expected)
