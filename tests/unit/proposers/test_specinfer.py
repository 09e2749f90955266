# SPDX-License-Identifier: Apache-2.0
"""Trees grown from a draft model: their shape, their order, and what the draft is asked."""

from dataclasses import replace

import pytest
import torch

from vllm_spec_plugins import compiled
from vllm_spec_plugins.config import SettingError
from vllm_spec_plugins.proposers.base import Deferring, StepContext
from vllm_spec_plugins.proposers.specinfer import CONSIDERED, SpecInferProposer
from vllm_spec_plugins.settings import SpecInferSettings

VOCAB = 40


class PathModel:
    """A draft model whose logits are a function of the path, and that keeps account of what it was asked."""

    def __init__(self, seed, sharpness=2.0, cost=0.0):
        self.seed, self.sharpness, self.cost = seed, sharpness, cost
        self.asked, self.kept, self.keeps, self.score = [], None, None, None

    def logits(self, request, path):
        generator = torch.Generator().manual_seed(hash((self.seed, request, *path)) % (1 << 60))
        return torch.randn(VOCAB, generator=generator) * self.sharpness

    def begin(self, ctx):
        self.asked = []
        self._keep([(b, ()) for b in range(len(ctx.slots))])
        return torch.stack([self.logits(b, ()) for b in range(len(ctx.slots))])

    def _keep(self, rows):
        """What an exit policy `keeps` (request, path) would say."""
        if self.keeps is not None:
            self.kept = torch.tensor([self.keeps(b, path) for b, path in rows], dtype=torch.bool)

    def extend(self, tree, request, row):
        out, rows = [], []
        for b, r in zip(request.tolist(), row.tolist(), strict=True):
            path, at = [], r
            if tree.tokens[b, at - 1] < 0:  # not on the CPU
                assert not compiled.loops_for(tree.tokens)
                out.append(torch.full((VOCAB,), float("nan")))
                rows.append((b, ()))
                continue
            while at:
                assert tree.tokens[b, at - 1] >= 0
                path.insert(0, int(tree.tokens[b, at - 1]))
                at = int(tree.parents[b, at - 1])
                assert at == 0 or (b, at) in [(x, y) for x, y, _ in self.asked]
            self.asked.append((b, r, tuple(path)))
            rows.append((b, tuple(path)))
            out.append(self.logits(b, tuple(path)))
        self._keep(rows)
        return torch.stack(out) if out else torch.empty(0, VOCAB)


def likeliest(logits, request, place, count):
    return logits.topk(count, 1)[::-1]


def context(batch, budget=None):
    return StepContext(
        slots=torch.arange(batch),
        token_ids=torch.zeros(batch, 20, dtype=torch.int32),
        lengths=torch.full((batch,), 5),
        max_length=5,
        num_emitted=torch.ones(batch),
        likeliest=likeliest,
        budget=budget,
    )


def nodes_of(tree, b):
    """Paths of a tree's nodes in their order."""
    paths = [()]
    for token, parent in zip(tree.tokens[b].tolist(), tree.parents[b].tolist(), strict=True):
        if token >= 0:
            paths.append((*paths[parent], token))
    return paths[1:]


def chances(model, b, path):
    """(token, chance) of the children of a path, best first."""
    best, tokens = model.logits(b, path).topk(CONSIDERED)
    return list(zip(tokens.tolist(), best.softmax(0).tolist(), strict=True))


@pytest.mark.parametrize("widths", [(1,), (3, 2, 1), (2, 2, 2), (1, 1, 3, 1)])
def test_an_expansion_vector_gives_every_node_its_number_of_children(widths, seed):
    model = PathModel(seed)
    proposer = SpecInferProposer(model, widths=widths)
    tree = proposer.propose(context(3))
    tree.validate()
    assert (proposer.max_depth, proposer.num_nodes) == (len(widths), tree.tokens.shape[1])
    for b in range(3):
        expected, level = [], [()]
        for width in widths:
            level = [(*path, token) for path in level for token, _ in chances(model, b, path)[:width]]
            expected += level
        assert sorted(nodes_of(tree, b)) == sorted(expected)
    # The draft has room for as many rows as the tree has nodes, less one.
    assert max(row for _, row, _ in model.asked or [(0, 0, ())]) < proposer.num_nodes or len(widths) == 1


def test_a_grown_tree_is_the_best_of_what_the_draft_was_asked(seed):
    model = PathModel(seed)
    proposer = SpecInferProposer(model, nodes=10, depth=4, ranks=3, min_chance=0.0)
    tree = proposer.propose(context(2))
    tree.validate()
    for b in range(2):
        asked = [()] + [path for request, _, path in model.asked if request == b]
        chance = {(): 1.0}
        for path in asked:
            for token, conditional in chances(model, b, path)[:3]:
                chance[(*path, token)] = chance[path] * conditional
        del chance[()]
        best = sorted(chance, key=lambda path: -chance[path])[:10]
        assert nodes_of(tree, b) == best
        assert float(tree.gain[b]) == pytest.approx(sum(chance[path] for path in best), rel=1e-4)
    assert max(row for _, row, _ in model.asked) < 10


def test_the_budget_and_the_least_chance_cut_the_tree_from_the_end(seed):
    model = PathModel(seed)
    whole = SpecInferProposer(model, nodes=10, min_chance=0.0).propose(context(1))
    cut = SpecInferProposer(model, nodes=10, min_chance=0.0).propose(context(1, budget=4))
    assert cut.num_nodes.tolist() == [4]
    assert torch.equal(cut.tokens[:, :4], whole.tokens[:, :4]) and cut.tokens.shape == whole.tokens.shape
    strict = SpecInferProposer(PathModel(seed, sharpness=0.0), nodes=10, min_chance=0.5)
    assert strict.propose(context(1)).num_nodes.tolist() == [0]


def test_a_draft_that_is_sure_of_nothing_is_not_run_again():
    model = PathModel(0, sharpness=0.0)
    SpecInferProposer(model, nodes=10, min_chance=0.3).propose(context(2))
    assert model.asked == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "model is missing"),
        ({"model": "m", "widths": "2,2"}, "widths=2,2 is not numbers"),
        ({"model": "m", "widths": "0-2"}, "widths=0-2 is not numbers"),
        ({"model": "m", "widths": "9-9-9"}, "widths=9-9-9 makes trees of 819 nodes; valid are at most 128"),
        ({"model": "m", "widths": "2-2", "nodes": 8}, "widths=2-2 fixes the tree, so nodes=8 does not go with it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, sentence):
    with pytest.raises(SettingError) as error:
        SpecInferSettings.parse(given)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_widths_are_read_from_the_flag():
    assert SpecInferSettings.parse({"model": "m", "widths": "2-2-1-1"}).expansion == [2, 2, 1, 1]
    assert SpecInferSettings.parse({"model": "m"}).expansion == []


@pytest.mark.parametrize("batch", [1, 3])
def test_a_level_is_run_only_if_reaching_it_is_worth_its_cost(batch, seed):
    dear = []
    for cost in (0.0, 0.2, 0.4, 0.6, 10.0):
        draft = PathModel(seed, cost=cost)
        tree = SpecInferProposer(draft, nodes=24, depth=6, min_chance=0.0).propose(context(batch))
        levels = {}
        for b, _, path in draft.asked:
            chance, prefix = 1.0, ()
            for token in path:
                chance *= dict(chances(draft, b, prefix))[token]
                prefix = (*prefix, token)
            levels[len(path)] = levels.get(len(path), 0.0) + chance
        assert all(reached >= 1.6 * cost * batch - 1e-5 for reached in levels.values())
        assert (tree.num_nodes > 0).all()
        dear.append(len(draft.asked))
    assert dear[0] == max(dear) > dear[-1] == 0 and dear == sorted(dear, reverse=True)


def test_nothing_is_drafted_below_an_answer_that_an_exit_policy_finds_not_good(seed):
    draft = PathModel(seed)
    draft.keeps = lambda b, path: b != 1 and sum(path) % 3 != 1
    tree = SpecInferProposer(draft, nodes=24, depth=5, min_chance=0.0).propose(context(3))
    tree.validate()
    for b in range(3):
        paths = nodes_of(tree, b)
        assert all(draft.keeps(b, path[:depth]) for path in paths for depth in range(len(path)))
        assert len(paths) == 0 if b == 1 else len(paths) > 4
    assert any(not draft.keeps(b, path) for b, _, path in draft.asked if b != 1)


def confidence(logits, request):
    return logits.softmax(1).amax(1)


def deferring(stands):
    return Deferring(confidence, stands)


@pytest.mark.parametrize("kept", [None, lambda b, path: len(path) < 2])
def test_a_cascades_tree_says_how_sure_the_draft_was_above_each_node(kept, seed):
    model = PathModel(seed)
    model.keeps = kept
    ctx = replace(context(3), deferring=deferring(lambda sure, request: torch.zeros(len(request))))
    tree = SpecInferProposer(model, nodes=10, depth=4, ranks=3, min_chance=0.0).propose(ctx)
    plain = SpecInferProposer(model, nodes=10, depth=4, ranks=3, min_chance=0.0).propose(context(3))
    assert torch.equal(tree.tokens, plain.tokens) and plain.confidence is None
    for b in range(3):
        for node, path in enumerate(nodes_of(tree, b)):
            sure = model.logits(b, path[:-1]).softmax(0).max()
            assert float(tree.confidence[b, node]) == pytest.approx(float(sure), rel=1e-5)


def test_a_policys_score_stands_in_the_place_of_the_drafts_probability(seed):
    model = PathModel(seed)
    model.score = torch.full((1,), 0.25)
    ctx = replace(context(1), deferring=deferring(lambda sure, request: torch.zeros(len(request))))
    tree = SpecInferProposer(model, nodes=3, depth=1, ranks=3, min_chance=0.0).propose(ctx)
    assert tree.confidence.tolist() == [[0.25, 0.25, 0.25]]


def test_where_the_draft_will_stand_its_stretch_is_a_chain_to_the_end(seed):
    """Of two requests one keeps all that the draft says; least chances cut the other's tree only."""
    model = PathModel(seed, sharpness=0.5)
    ctx = replace(context(2), deferring=deferring(lambda sure, request: (request == 0).float()))
    tree = SpecInferProposer(model, nodes=12, depth=5, ranks=3, min_chance=0.3).propose(ctx)
    path = ()
    for _ in range(5):
        path = (*path, chances(model, 0, path)[0][0])
    assert nodes_of(tree, 0) == [path[:depth] for depth in range(1, 6)]
    assert tree.chance[0].tolist() == [1.0] * 5 + [0.0] * 7
    assert int(tree.num_nodes[1]) == 0


def test_the_first_candidates_chance_is_to_be_drawn_or_to_stand_all_the_same(seed):
    model = PathModel(seed)
    ctx = replace(context(1), deferring=deferring(lambda sure, request: torch.full((len(request),), 0.9)))
    tree = SpecInferProposer(model, nodes=8, depth=1, ranks=8, min_chance=0.0).propose(ctx)
    (_, first), *others = chances(model, 0, ())
    expected = [first + (1 - first) * 0.9, *(chance * 0.1 for _, chance in others)]
    assert tree.chance[0].tolist() == pytest.approx(expected, rel=1e-4)
