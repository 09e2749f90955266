# SPDX-License-Identifier: Apache-2.0
"""What a GPU runs of trees, rules and proposers never makes the host wait, and comes to what the CPU comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.no_sync import DEVICE, device, hosted, no_sync, on_device, on_host
from tests.unit.proposers.simulate import MarkovTarget, Outcome, from_next_token, simulate
from vllm_spec_plugins import compiled
from vllm_spec_plugins.cascade.routes import Routes
from vllm_spec_plugins.cascade.rules import Deferral, deferral_rule
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.proposers.jacobi import JacobiProposer
from vllm_spec_plugins.proposers.lookahead import LookaheadProposer
from vllm_spec_plugins.proposers.medusa import MedusaProposer
from vllm_spec_plugins.proposers.mixture import MixtureProposer
from vllm_spec_plugins.proposers.specinfer import SpecInferProposer
from vllm_spec_plugins.tree.accept import TargetRows, Typical, Walk
from vllm_spec_plugins.tree.tree import TokenTree

VOCAB, SLOTS, WIDTH = 40, 3, 12


@pytest.fixture(autouse=True)
def _(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tensor code on both sides, so that results are equal to the last bit."""
    monkeypatch.setattr(compiled, "use_loops", False)
    with torch.inference_mode(), device():
        yield


class OnDevice:
    """A proposer of the device for a simulation on the host. The first calls make what is made once."""

    WARM = 2

    def __init__(self, proposer: Any) -> None:
        self.proposer, self.calls = proposer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proposer, name)

    def propose(self, ctx: StepContext) -> TokenTree:
        self.calls += 1
        given = on_device(ctx)
        if self.calls <= self.WARM:
            return on_host(self.proposer.propose(given))
        with no_sync():
            return on_host(self.proposer.propose(given))


class WithGuesses:
    """Gives a proposer what an engine knows beside the text: hidden states and the sampler's preferences, both made of it."""

    def __init__(self, proposer: Any, weights: Tensor) -> None:
        self.proposer, self.weights = proposer, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proposer, name)

    def propose(self, ctx: StepContext) -> TokenTree:
        last = ctx.token_ids[ctx.slots, ctx.lengths - 1].long()
        return self.proposer.propose(replace(ctx, hidden=self.weights[last], likeliest=hosted(likeliest)))


def likeliest(logits: Tensor, request: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    scores, tokens = logits.topk(count, 1)
    return tokens, scores


class Bigrams:
    """A draft model: logits by the token before. On the device it does not synchronise either."""

    cost, kept, score = 0.0, None, None

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def begin(self, ctx: StepContext) -> Tensor:
        return self.table[ctx.token_ids[ctx.slots, ctx.lengths - 1].long()]

    def extend(self, tree: TokenTree, request: Tensor, row: Tensor) -> Tensor:
        return self.table[tree.tokens[request, row - 1].clamp(min=0)]


def heads_of(table: Tensor) -> Callable[[Tensor], Tensor]:
    """[B, H] hidden states -> [B, 3, V]"""
    return lambda hidden: torch.stack([hidden @ table.roll(shift, 0).T for shift in range(3)], 1)


def make(name: str, at: torch.device, bigrams: Tensor, table: Tensor) -> Any:
    common: dict[str, Any] = {"max_requests": SLOTS, "device": at}
    here: Callable[[Tensor], Tensor] = on_device if at == DEVICE else lambda tensor: tensor
    draft = Bigrams(here(bigrams))
    heads: Any = heads_of(here(table))
    makers: dict[str, Callable[[], Any]] = {
        "lookahead": lambda: LookaheadProposer(**common, guesses=2, nodes=8, min_chance=0.02),
        "window": lambda: LookaheadProposer(**common, window=4, ngram=3, guesses=3, nodes=6, eos_token_ids=(3,)),
        "shared pool": lambda: LookaheadProposer(**common, ngram=3, guesses=3, nodes=6, shared_pool=True),
        "jacobi": lambda: JacobiProposer(**common, block=4, mode="parallel", parallel_tokens=0),
        "jacobi blocks": lambda: JacobiProposer(**common, block=4, mode="blocks", parallel_tokens=0),
        "jacobi hybrid": lambda: JacobiProposer(**common, block=4, mode="hybrid", parallel_tokens=9),
        "medusa": lambda: MedusaProposer(heads, **common, nodes=8, depth=3, ranks=4, min_chance=0.01),
        "medusa choices": lambda: MedusaProposer(heads, **common, choices=[(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]),
        "specinfer": lambda: SpecInferProposer(draft, nodes=8, depth=3, ranks=3, min_chance=0.01),
        "specinfer widths": lambda: SpecInferProposer(draft, widths=(2, 2, 1)),
    }
    makers["mix"] = lambda: MixtureProposer(
        [makers["window"](), makers["medusa"](), makers["specinfer"]()], **common, min_chance=0.0
    )
    return WithGuesses(makers[name](), here(table))


NAMES = [
    "lookahead", "window", "shared pool", "jacobi", "jacobi blocks", "jacobi hybrid", "medusa", "medusa choices", "specinfer",
    "specinfer widths", "mix",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_proposer_does_not_make_the_host_wait(name: str, rng: torch.Generator) -> None:
    seed = int(torch.randint(1 << 30, (1,), generator=rng))
    bigrams, table = (torch.randn(VOCAB, width, generator=rng) for width in (VOCAB, WIDTH))
    prompts = [torch.randint(VOCAB, (9 + 3 * k,), generator=rng).tolist() for k in range(3)]
    target = from_next_token(MarkovTarget(VOCAB, 1, 0.0, seed))

    def run(proposer: Any) -> Outcome:
        own = torch.Generator().manual_seed(seed)
        budgets = iter([None, 5, None, 0, None] * 100)
        return simulate(
            proposer, target, prompts, max_new=14, slots=SLOTS, rng=own, chunks=2, skip=0.1, cut=0.1,
            budget=lambda: next(budgets), vocab=VOCAB,
        )  # fmt: skip

    on_cpu = run(make(name, torch.device("cpu"), bigrams, table))
    there = OnDevice(make(name, DEVICE, bigrams, table))
    found = run(there)
    assert there.calls > there.WARM + 2 and any(len(tree) > 1 for trees in on_cpu.proposed for tree in trees)
    assert found.proposed == on_cpu.proposed and found.outputs == on_cpu.outputs


def random_trees(batch: int, nodes: int, rng: torch.Generator) -> TokenTree:
    """Few tokens, so that walks go on, and trees of every size."""
    parents = torch.stack([torch.randint(j + 1, (batch,), generator=rng) for j in range(nodes)], 1)
    tokens = torch.randint(3, (batch, nodes), generator=rng)
    tree = TokenTree(tokens, parents, nodes, confidence=torch.rand(batch, nodes, generator=rng))
    return tree.truncate(torch.randint(nodes + 1, (batch,), generator=rng))


RULES = {
    "walk": Walk,
    "typical": Typical,
    **{
        text: lambda text=text: Deferral(deferral_rule(text))
        for text in ("confidence:0.5", "difference:0.1", "top:0.5")
    },
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_make_the_host_wait(name: str, rng: torch.Generator) -> None:
    rule: Any = RULES[name]()
    accepted = 0
    for batch, nodes in ((1, 1), (3, 5), (4, 9)):
        tree = random_trees(batch, nodes, rng)
        rows = torch.arange(nodes + 1).expand(batch, -1)
        index = (torch.arange(batch).unsqueeze(1) * (nodes + 1) + rows).where(rows <= tree.num_nodes.unsqueeze(1), -1)
        drawn = torch.randint(3, (batch, nodes + 1), generator=rng).where(index >= 0, -1)
        target = TargetRows(
            torch.randn(batch * (nodes + 1), 5, generator=rng), index, torch.arange(batch) % 2 == 0,
            threshold=torch.tensor([0.3, math.inf] * batch)[:batch],
        )  # fmt: skip
        expected = rule(tree, drawn, target)
        given = on_device((tree, drawn, target))
        with no_sync():
            found = rule(*given)
        for each in ("path", "num_accepted", "emitted", "num_emitted"):
            assert torch.equal(on_host(getattr(found, each)), getattr(expected, each)), each
        accepted += int(expected.num_accepted.sum())
    assert accepted > 0


def test_routes_do_not_make_the_host_wait(rng: torch.Generator) -> None:
    rule = deferral_rule("confidence:0.5")
    here, there = Routes(rule, 4, "auto", 0.5), Routes(rule, 4, "auto", 0.5, DEVICE)
    slots = torch.tensor([2, 0])
    for _ in range(4):
        tree = random_trees(2, 6, rng)
        drawn = torch.randint(3, (2, 7), generator=rng)
        acceptance = Walk()(tree, drawn)
        here.observe(slots, tree, drawn, acceptance)
        confidence = torch.rand(2, generator=rng)
        given = on_device((slots, tree, drawn, acceptance, confidence))
        with no_sync():
            there.observe(*given[:4])
            found = there.thresholds(given[0]), there.stands(given[4], given[0])
        assert torch.equal(on_host(found[0]), here.thresholds(slots))
        assert torch.equal(on_host(found[1]), here.stands(confidence, slots))
