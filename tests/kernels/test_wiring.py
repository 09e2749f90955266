# SPDX-License-Identifier: Apache-2.0
"""Where the package asks for a kernel it gets what its loops, or its tensor code, would have answered."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.proposers.simulate import MarkovTarget, from_next_token, simulate
from tests.unit.test_on_device import RULES, SLOTS, VOCAB, WIDTH, make, random_trees
from vllm_spec_plugins import compiled
from vllm_spec_plugins.compiled import kernels_for, loops_for
from vllm_spec_plugins.proposers.mixture import MixtureProposer
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
PROPOSERS = {
    "window": ("loops", {"history", "trie", "ngram_pool"}),
    "medusa": ("loops", {"growth", "ranks"}),
    "medusa choices": ("loops", {"growth", "ranks"}),
    "specinfer": ("tensors", {"growth"}),
    "specinfer widths": ("tensors", {"growth"}),
    "mix": ("loops", {"history", "trie", "ngram_pool", "growth", "ranks", "union"}),
}
MODULES = ("history", "trie", "ngram_pool", "growth", "ranks", "union")


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
        if name == "mix":
            sources = [make(each, CPU, bigrams, table) for each in ("window", "medusa")]
            proposer: Any = MixtureProposer(sources, max_requests=SLOTS, min_chance=0.0)
        else:
            proposer = make(name, CPU, bigrams, table)
        own = torch.Generator().manual_seed(seed)
        return simulate(proposer, target, prompts, max_new=5, slots=SLOTS, rng=own, chunks=2, cut=0.1, vocab=VOCAB)

    asked: set[str] = set()
    plain = run(other)
    for module in MODULES:
        watch(f"vllm_spec_plugins.kernels.{module}", module, asked, monkeypatch)
    found = run("kernels")
    assert asked == expected
    assert found.proposed == plain.proposed and found.outputs == plain.outputs
    assert any(len(tree) > 1 for trees in plain.proposed for tree in trees)


def watch(module: str, name: str, asked: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes in `asked` that one of the module's functions was called from outside of kernels/."""
    __import__(module)
    for function in (
        "history_guesses",
        "trie",
        "lookup",
        "insert",
        "ranked",
        "chosen",
        "likeliest_nodes",
        "judge",
        "union",
    ):
        original = getattr(sys.modules[module], function, None)
        if original is not None and original.__module__ == module:

            def noted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                asked.add(name)
                return original(*args, **kwargs)

            monkeypatch.setattr(sys.modules[module], function, noted)


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
