# SPDX-License-Identifier: Apache-2.0
"""Trees of candidates that depend on their depth alone, and the chances they are grown from."""

import heapq
import math
from types import SimpleNamespace

import pytest
import torch

from tests.unit.tree.naive import paths
from vllm_spec_plugins import compiled
from vllm_spec_plugins.tree import from_choices
from vllm_spec_plugins.tree.builders import chosen, ranked
from vllm_spec_plugins.tree.ranks import Ranks


def grown(candidates, chance, limit, least):
    """The best `limit` paths, best-first from the root: a node comes up when its parent was taken."""
    depth, ranks = chance.shape
    heap = [(-float(chance[0, r]), (r,)) for r in range(ranks)]
    heapq.heapify(heap)
    found = []
    while heap and len(found) < limit:
        product, path = heapq.heappop(heap)
        if -product < least:
            break
        found.append((path, -product))
        if len(path) < depth:
            for r in range(ranks):
                heapq.heappush(heap, (product * float(chance[len(path), r]), (*path, r)))
    tokens = {tuple(int(candidates[d, r]) for d, r in enumerate(path)) for path, _ in found}
    return tokens, sum(product for _, product in found)


@pytest.mark.parametrize(
    ("depth", "ranks", "nodes"), [(1, 1, 1), (1, 6, 4), (4, 1, 6), (4, 8, 16), (3, 5, 40), (5, 3, 64)]
)
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_the_tree_is_the_best_one_under_its_budget(depth, ranks, nodes, least, rng):
    batch = 12
    candidates = torch.stack([torch.randperm(1000, generator=rng)[: depth * ranks] for _ in range(batch)])
    candidates = candidates.view(batch, depth, ranks)
    chance = torch.rand(batch, depth, ranks, generator=rng).double().sort(2, descending=True).values
    for limit in (nodes, nodes // 2, 0):
        tree = ranked(candidates, chance, nodes, limit, least)
        tree.validate()
        assert tree.tokens.shape == (batch, nodes)
        for b in range(batch):
            expected, gain = grown(candidates[b], chance[b], limit, least)
            assert set(paths(tree, b)) == expected
            assert float(tree.gain[b]) == pytest.approx(gain)


def test_a_fixed_tree_holds_the_candidates_of_its_ranks_and_is_cut_from_its_end(rng):
    choices = [[0], [0, 0], [1], [0, 2], [0, 0, 1], [3]]
    shape = from_choices(choices)
    candidates = torch.randperm(1000, generator=rng)[: 5 * 4 * 5].view(5, 4, 5)
    chance = torch.rand(5, 4, 5, generator=rng)
    for limit in (6, 4, 0, 9):
        tree = chosen(shape, candidates, chance, limit)
        tree.validate()
        assert tree.tokens.shape == (5, 6)
        for b in range(5):
            expected = [tuple(int(candidates[b, d, r]) for d, r in enumerate(path)) for path in choices[:limit]]
            assert paths(tree, b) == expected
            gain = sum(math.prod(float(chance[b, d, r]) for d, r in enumerate(path)) for path in choices[:limit])
            assert float(tree.gain[b]) == pytest.approx(gain)


def test_loops_and_tensors_choose_the_same_nodes_from_the_same_counts(rng, monkeypatch):
    """To the bit: chances that differ in their last one would let a tie fall the other way."""
    shape = from_choices([[0], [1], [0, 3], [0, 3, 2]])
    sides = [Ranks(6, 3, 4, torch.device("cpu")) for _ in range(2)]
    token_ids = torch.randint(5, (6, 40), generator=rng, dtype=torch.int32)
    for _ in range(60):
        slots = torch.randperm(6, generator=rng)[:4]
        lengths = torch.randint(5, 40, (4,), generator=rng)
        emitted = torch.randint(5, (4,), generator=rng, dtype=torch.int32)
        offered = torch.randint(5, (4, 3, 4), generator=rng)
        late = torch.randint(4, (4,), generator=rng) == 0
        trees = []
        for ranks, on in zip(sides, (True, False), strict=True):
            monkeypatch.setattr(compiled, "use_loops", on)
            ranks.offer(slots, lengths - emitted - late.long(), offered)
            ranks.observe(SimpleNamespace(slots=slots, token_ids=token_ids, lengths=lengths, num_emitted=emitted))
            chance = ranks.chance(slots)
            trees.append((ranked(offered, chance, 7, 5, 0.05), chosen(shape, offered, chance, 3), chance))
        one, other = sides
        assert torch.equal(one.hits, other.hits)
        assert torch.equal(one.seen, other.seen)
        assert torch.equal(one.offered, other.offered)
        assert torch.equal(trees[0][2], trees[1][2])
        for loop, tensor in zip(trees[0][:2], trees[1][:2], strict=True):
            assert torch.equal(loop.tokens, tensor.tokens)
            assert torch.equal(loop.parents, tensor.parents)
            assert torch.allclose(loop.gain.float(), tensor.gain)
    assert one.seen.sum() > 0


def test_equal_and_rising_chances_still_give_trees(rng):
    candidates = torch.arange(12).view(1, 3, 4).expand(5, 3, 4)
    for chance in (torch.ones(5, 3, 4), torch.zeros(5, 3, 4), torch.rand(5, 3, 4, generator=rng)):
        tree = ranked(candidates, chance, 9, 9)
        tree.validate()
        assert tree.num_nodes.tolist() == [9] * 5


def step(slots, texts, emitted):
    width = max(map(len, texts))
    token_ids = torch.full((max(slots) + 1, width), 7, dtype=torch.int32)
    for slot, text in zip(slots, texts, strict=True):
        token_ids[slot, : len(text)] = torch.tensor(text)
    return SimpleNamespace(
        slots=torch.tensor(slots),
        token_ids=token_ids,
        lengths=torch.tensor([len(text) for text in texts]),
        num_emitted=torch.tensor(emitted),
    )


def test_every_emitted_token_judges_the_candidates_of_its_depth():
    ranks = Ranks(4, 3, 2, torch.device("cpu"))
    ranks.offer(
        torch.tensor([2, 0]), torch.tensor([1, 2]), torch.tensor([[[5, 6], [1, 2], [3, 4]], [[5, 6], [1, 2], [3, 4]]])
    )
    # Row 2 emitted 6 (rank 1), 9 (none); row 0 is still inside its prompt.
    ranks.observe(step([2, 0], [[8, 6, 9], [5, 5]], [2, 0]))
    assert ranks.hits[2].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert ranks.seen[2].flatten().tolist() == [1, 1, 0]
    assert ranks.seen[0].sum() == 0
    assert ranks.hits[-1].tolist() == [[0, 1], [0, 0], [0, 0]]
    # What was offered is judged once.
    ranks.observe(step([2], [[8, 6, 9, 6]], [1]))
    assert ranks.seen[2].flatten().tolist() == [1, 1, 0]


def test_tokens_that_were_emitted_later_judge_nothing():
    """A step without a tree may go unobserved; what was offered before it stood somewhere else."""
    ranks = Ranks(1, 2, 2, torch.device("cpu"))
    ranks.offer(torch.tensor([0]), torch.tensor([1]), torch.tensor([[[5, 6], [1, 2]]]))
    ranks.observe(step([0], [[8, 5, 5]], [1]))
    assert ranks.seen.sum() == 0
    ranks.observe(step([0], [[8, 5]], [1]))
    assert ranks.seen.sum() == 0  # forgotten


def test_measured_chances_come_to_the_frequencies(rng):
    true = torch.tensor([[0.6, 0.2], [0.3, 0.3]])
    ranks = Ranks(2, 2, 2, torch.device("cpu"))
    offered = torch.tensor([[[1, 2], [3, 4]]])
    counts = []
    for turn in range(1500):
        ranks.offer(torch.tensor([1]), torch.tensor([1]), offered)
        drawn = [int(torch.multinomial(torch.cat((row, 1 - row.sum().view(1))), 1, generator=rng)) for row in true]
        text = [0, *(int(offered[0, d, r]) if r < 2 else 9 for d, r in enumerate(drawn))]
        right = drawn[0] < 2
        ranks.observe(step([1], [text if right else text[:2]], [2 if right else 1]))
        if turn > 300:
            counts.append(ranks.chance(torch.tensor([1]))[0])
    assert torch.allclose(torch.stack(counts).mean(0), true, atol=0.08)


def test_a_new_request_leans_on_what_all_have_shown():
    ranks = Ranks(3, 1, 1, torch.device("cpu"))
    for _ in range(200):
        ranks.offer(torch.tensor([0]), torch.tensor([1]), torch.tensor([[[4]]]))
        ranks.observe(step([0], [[1, 4]], [1]))
    ranks.clear(1)
    assert float(ranks.chance(torch.tensor([1]))) == pytest.approx(float(ranks.hits[-1] / ranks.seen[-1]), abs=0.1)
    assert float(ranks.chance(torch.tensor([1]))) > 0.85
