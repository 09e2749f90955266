# SPDX-License-Identifier: Apache-2.0
"""Deferral rules against their formulas, and the path that they leave against a plain walk."""

import math

import pytest
import torch

from tests.unit.tree.naive import random_tree, unpad
from vllm_spec_plugins.cascade.rules import Deferral, deferral_rule
from vllm_spec_plugins.tree import TargetRows, TokenTree, Walk

# Whatever is shown here is shown of the loops and of the tensor code.
pytestmark = pytest.mark.usefixtures("on_both_paths")

VOCAB = 6
RULES = ["confidence:0.5", "difference:0.1", "difference:-0.2", "top:0.4", "top:0", "exit:margin:0.5"]


def scene(rng, batch=40, nodes=14, greedy=True):
    """Trees with the draft's confidence, the target's rows in random order, and its draws: argmax, or sampled."""
    bare = random_tree(rng, batch=batch, nodes=nodes, vocab=VOCAB)
    rows = nodes + 1
    behind = torch.rand(batch, rows, generator=rng)
    tree = TokenTree(bare.tokens, bare.parents, bare.max_depth, confidence=behind.gather(1, bare.parents))
    logits = 1.5 * torch.randn(batch * rows + 3, VOCAB, generator=rng)
    index = torch.randperm(len(logits), generator=rng)[: batch * rows].view(batch, rows)
    p = logits[index].softmax(-1)
    drawn = p.argmax(-1) if greedy else p.view(-1, VOCAB).multinomial(1, generator=rng).view(batch, rows)
    gone = torch.nn.functional.pad(tree.tokens < 0, (1, 0))
    return tree, TargetRows(logits, index.masked_fill(gone, -1)), drawn.masked_fill(gone, -1)


def distinct(tree):
    """[B] bool: no two siblings are equal, as in trees that a draft has grown; of equal ones the rule knows the first alone."""
    out = []
    for tokens, parents in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        nodes = [node for node in zip(tokens, parents, strict=True) if node[0] >= 0]
        out.append(len(set(nodes)) == len(nodes))
    return torch.tensor(out)


def stands(rule, q, p, x):
    """The formulas, in plain numbers."""
    name, _, rest = rule.partition(":")
    bound = float(rest.rpartition(":")[2])
    if name == "difference":
        return q >= max(p) - bound
    if name == "top":
        return p[x] >= (1 - bound) * max(p) - 1e-9
    return q >= bound


def cascaded(rule, tokens, parents, q, p, drawn):
    """Row by row from the root: the first child if it stands, else the draw's child, if there is one."""
    at, emitted = 0, []
    while True:
        children = [j + 1 for j, token in enumerate(tokens) if token >= 0 and parents[j] == at and drawn[j + 1] >= 0]
        if children and stands(rule, q[children[0] - 1], p[at], tokens[children[0] - 1]):
            at = children[0]
        else:
            same = [row for row in children if tokens[row - 1] == drawn[at]]
            if not same:
                return [*emitted, drawn[at]]
            (at,) = same
        emitted.append(tokens[at - 1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("greedy", [True, False])
def test_the_path_is_that_of_the_rules_formula(rule, greedy, rng):
    tree, target, drawn = scene(rng, batch=120, nodes=8, greedy=greedy)
    got = Deferral(deferral_rule(rule))(tree, drawn, target)
    p = target.logits.softmax(-1)[target.index.clamp(min=0)].tolist()
    differs = 0
    for b in distinct(tree).nonzero().flatten().tolist():
        arrays = tree.tokens[b].tolist(), tree.parents[b].tolist(), tree.confidence[b].tolist()
        assert unpad(got.emitted[b]) == cascaded(rule, *arrays, p[b], drawn[b].tolist())
        differs += unpad(got.emitted[b]) != unpad(Walk()(tree, drawn).emitted[b])
    assert differs > 0 or rule == "top:0"


@pytest.mark.parametrize("rule", ["confidence:2", "difference:-1", "top:0"])
def test_at_its_exact_end_a_rule_is_the_walk(rule, rng):
    tree, target, drawn = scene(rng, batch=200, nodes=8)
    got, walk = Deferral(deferral_rule(rule))(tree, drawn, target), Walk()(tree, drawn)
    once = distinct(tree)
    assert once.sum() > 20
    assert torch.equal(got.emitted[once], walk.emitted[once])
    assert torch.equal(got.num_emitted[once], walk.num_emitted[once])


@pytest.mark.parametrize("rule", ["confidence:0", "difference:1", "top:1"])
def test_at_its_bold_end_a_rule_keeps_every_first_child(rule, rng):
    tree, target, drawn = scene(rng)
    got = Deferral(deferral_rule(rule))(tree, drawn, target)
    for b in range(len(drawn)):
        tokens, parents, at, chain = tree.tokens[b].tolist(), tree.parents[b].tolist(), 0, []
        while children := [j + 1 for j, token in enumerate(tokens) if token >= 0 and parents[j] == at]:
            at = children[0]
            chain.append(tokens[at - 1])
        assert unpad(got.emitted[b]) == [*chain, int(drawn[b, at])]


def test_each_request_has_its_own_threshold_and_inf_is_the_walk(rng):
    tree, target, drawn = scene(rng)
    exact = torch.rand(len(drawn), generator=rng) < 0.5
    threshold = torch.full((len(drawn),), 0.2).masked_fill(exact, math.inf)
    rule = Deferral(deferral_rule("confidence:0.9"))
    got = rule(tree, drawn, TargetRows(target.logits, target.index, threshold=threshold))
    bold = Deferral(deferral_rule("confidence:0.2"))(tree, drawn, target)
    assert torch.equal(got.emitted[exact], Walk()(tree, drawn).emitted[exact])
    assert torch.equal(got.emitted[~exact], bold.emitted[~exact])
    assert (bold.emitted != Walk()(tree, drawn).emitted).any()


def test_what_the_target_rules_out_and_what_was_cut_never_stands():
    tree = TokenTree(torch.tensor([[1], [1]]), torch.tensor([[0], [0]]), confidence=torch.ones(2, 1))
    logits = torch.zeros(4, VOCAB)
    logits[0, 1] = -math.inf
    target = TargetRows(logits, torch.tensor([[0, 1], [2, -1]]))
    got = Deferral(deferral_rule("confidence:0"))(tree, torch.tensor([[2, 0], [2, -1]]), target)
    assert got.num_accepted.tolist() == [0, 0]
    assert got.emitted[:, 0].tolist() == [2, 2]


def test_text_is_a_draw_from_the_draft_where_the_rule_keeps_and_from_the_target_elsewhere():
    """One row, a first child drawn from q with the target's noise, by enumeration over that noise: 200,000 draws."""
    generator = torch.Generator().manual_seed(5)
    noise = -torch.rand(200_000, VOCAB, generator=generator).log().neg().log()
    p, q = (torch.randn(VOCAB, generator=generator).softmax(0) for _ in range(2))
    child, drawn = (torch.log(each) + noise for each in (q, p))
    child, drawn = child.argmax(1), drawn.argmax(1)
    batch = len(child)
    tree = TokenTree(child[:, None], torch.zeros(batch, 1, dtype=torch.int64), confidence=q.max().expand(batch, 1))
    rows = torch.stack((drawn, torch.zeros_like(drawn)), 1)
    index = torch.arange(2).expand(batch, 2)
    target = TargetRows(torch.stack((p.log(), p.log())), index)
    for bound, expected in ((1.0, q), (-1.0, p)):
        got = Deferral(deferral_rule(f"difference:{bound}"))(tree, rows, target)
        share = torch.bincount(got.emitted[:, 0], minlength=VOCAB) / batch
        assert torch.allclose(share, expected, atol=0.006)
    assert (p - q).abs().max() > 0.05


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("chow:1", "chow:1 is no deferral rule; valid are confidence:0.8, difference:0.1, top:0.5, exit:margin:0.4"),
        ("confidence", "confidence has '' where a number of 0 to 2 belongs; write confidence:0.8"),
        ("difference:x", "difference:x has 'x' where a number of -1 to 1 belongs; write difference:0.1"),
        ("difference:nan", "difference:nan has 'nan' where a number of -1 to 1 belongs"),
        ("top:1.5", "top:1.5 has '1.5' where a number of 0 to 1 belongs; write top:0.5"),
        ("exit:margins:1", "exit:margins:1 names an exit policy that cannot be used: margins:1 is no exit policy"),
        ("exit:margin:7", "exit:margin:7 names an exit policy that cannot be used: margin:7 has '7' where"),
    ],
)
def test_a_rule_that_cannot_be_read_says_what_would_be_valid(text, sentence):
    with pytest.raises(ValueError) as error:
        deferral_rule(text)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "text", ["confidence:0.5", "difference:0.1", "top:0.25", "exit:margin:0.5", "exit:entropy:1.5"]
)
def test_a_rule_reads_what_it_writes_and_takes_another_bound(text):
    rule = deferral_rule(text)
    again = deferral_rule(str(rule.at(0.75)))
    assert str(rule) == text and (again.bound, again.threshold) == (0.75, rule.at(0.75).threshold)
    bolder = 0.125 if text.split(":")[-2] in ("difference", "top", "entropy") else -0.125
    assert rule.at(rule.bound + bolder).threshold < rule.threshold
    with pytest.raises(ValueError, match="is out of range for"):
        rule.at(math.inf)
