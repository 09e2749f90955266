# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.tree.naive import paths
from vllm_spec_plugins.cpu.kernels.noise import gumbel_argmax, gumbel_topk
from vllm_spec_plugins.proposers.base import StepContext
from vllm_spec_plugins.proposers.medusa import HeadsError, HeadShapes, MedusaHeads, MedusaProposer

HEADS = Path(__file__).parents[2] / "models" / "medusa" / "model.safetensors"
CPU = torch.device("cpu")


def original_layout(weights):
    """The names of the original repository for vLLM's."""
    named = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            named[f"{parts[1]}.{parts[3]}.linear.{parts[4]}"] = tensor
        else:
            named[f"{parts[1]}.1.weight"] = tensor
    return named


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_heads_are_counted_from_the_weights_of_either_layout():
    weights = load_file(HEADS)
    for named in (
        weights,
        original_layout(weights),
        {f"medusa_head.{k}": v for k, v in original_layout(weights).items()},
    ):
        assert HeadShapes.of(shapes(named)) == HeadShapes(heads=4, layers=1, hidden=256, vocab=4096)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: {}, "no Medusa heads"),
        (lambda w: {"model.norm.weight": torch.zeros(4)}, "no Medusa heads among its tensors (model.norm.weight"),
        (
            lambda w: {k: v for k, v in w.items() if not k.startswith("lm_heads.2")},
            "3 matrices to the vocabulary for 4",
        ),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("blocks.1")}, "no Medusa heads"),
        (lambda w: {**w, "blocks.0.layers.1.weight": torch.zeros(256, 256)}, "different numbers of layers"),
        (lambda w: {**w, "blocks.0.layers.0.weight": torch.zeros(256, 128)}, "different widths"),
        (lambda w: {**w, "lm_heads.0.weight": torch.zeros(100, 256)}, "different shapes"),
    ],
)
def test_what_are_no_heads_is_said(change, sentence):
    with pytest.raises(HeadsError, match=sentence.replace("(", r"\(")):
        HeadShapes.of(shapes(change(load_file(HEADS))))


def test_a_head_is_a_residual_block_and_a_matrix(rng):
    weights = {k: v.float() for k, v in load_file(HEADS).items()}
    hidden = torch.randn(3, 256, generator=rng)
    expected = torch.stack(
        [
            (hidden + torch.nn.functional.silu(hidden @ weights[f"blocks.{k}.layers.0.weight"].T))
            @ weights[f"lm_heads.{k}.weight"].T
            for k in range(3)
        ],
        1,
    )
    for named in (weights, original_layout(weights)):
        found = MedusaHeads(named.items(), 3, 4096, CPU, torch.float32)(hidden)
        assert torch.allclose(found, expected, atol=1e-4)
    # Biases, two layers, one matrix for all heads, and a vocabulary that the checkpoint pads.
    more = {k: v for k, v in weights.items() if k.startswith("blocks")}
    more |= {f"blocks.{k}.layers.1.weight": torch.randn(256, 256, generator=rng) * 0.02 for k in range(4)}
    more |= {f"blocks.{k}.layers.{n}.bias": torch.randn(256, generator=rng) for k in range(4) for n in range(2)}
    more["lm_head.weight"] = weights["lm_heads.0.weight"]
    x = hidden
    for n in range(2):
        x = x + torch.nn.functional.silu(x @ more[f"blocks.1.layers.{n}.weight"].T + more[f"blocks.1.layers.{n}.bias"])
    found = MedusaHeads(more.items(), 2, 4000, CPU, torch.float32)(hidden)
    assert torch.allclose(found[:, 1], (x @ more["lm_head.weight"].T)[:, :4000], atol=1e-3)


def noise_of(seed, position, vocab):
    """The whole row of noise, token by token: a draw between one token and a floor."""
    out = torch.empty(vocab)
    for token in range(vocab):
        row = torch.full((1, vocab), -1e9)
        row[0, token] = 0.0
        _, value = gumbel_argmax(row.numpy(), None, seed, position, False, False)
        out[token] = float(value[0])
    return out


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 30.0])
def test_coupled_candidates_are_the_largest_of_logits_and_the_samplers_noise(scale, rng):
    rows, vocab, count = 6, 300, 8
    logits = torch.randn(rows, vocab, generator=rng) * scale
    logits[:, :40] = -torch.inf
    seeds, positions = torch.randint(1 << 40, (rows,), generator=rng), torch.randint(500, (rows,), generator=rng)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.0, 0.0, 1.3])
    found, sums = gumbel_topk(logits.numpy(), temperature.numpy(), seeds.numpy(), positions.numpy(), count)
    for row in range(rows):
        at = slice(row, row + 1)
        noise = noise_of(seeds[at].numpy(), positions[at].numpy(), vocab) if temperature[row] else torch.zeros(vocab)
        expected = (logits[row] + noise).argsort(descending=True, stable=True)[:count]
        assert found[row].tolist() == expected.tolist()
        torch.testing.assert_close(torch.from_numpy(sums[row]), (logits[row] + noise)[expected], rtol=1e-4, atol=1e-4)
    best, _ = gumbel_argmax(logits.numpy(), None, seeds.numpy(), positions.numpy(), False, False)
    sampled = temperature.numpy() > 0
    assert (found[sampled, 0] == best[sampled]).all()


def test_heads_answer_for_any_number_of_requests_from_the_same_memory(rng):
    weights = {k: v.float() for k, v in load_file(HEADS).items()}
    shared = {k: v for k, v in weights.items() if k.startswith("blocks")}
    shared["lm_head.weight"] = weights["lm_heads.0.weight"]
    hidden = torch.randn(5, 256, generator=rng)
    for named in (weights, shared):
        for dtype in (torch.float32, torch.bfloat16):
            heads = MedusaHeads(named.items(), 4, 4096, CPU, dtype)
            each = [heads(row.unsqueeze(0).to(dtype)).clone() for row in hidden]
            assert all(logits.shape == (1, 4, 4096) and logits.dtype == torch.float32 for logits in each)
            together = heads(hidden.to(dtype))
            assert torch.allclose(together, torch.cat(each), atol=1e-4 if dtype == torch.float32 else 0.5)
            memory = heads._logits.data_ptr()
            assert torch.equal(heads(hidden[:3].to(dtype)), heads(hidden[:3].to(dtype).clone()))
            assert heads._logits.data_ptr() == memory


def step(hidden):
    return StepContext(
        slots=torch.tensor([2, 0]),
        token_ids=torch.zeros(3, 20, dtype=torch.int32),
        lengths=torch.tensor([5, 9]),
        max_length=9,
        num_emitted=torch.tensor([1, 1]),
        hidden=hidden,
        likeliest=lambda logits, request, place, count: logits.topk(count, 1)[::-1],
    )


def test_a_fixed_tree_holds_the_heads_candidates_by_rank(rng):
    weights = {k: v.float() for k, v in load_file(HEADS).items()}
    heads = MedusaHeads(weights.items(), 2, 4096, CPU, torch.float32)
    choices = [[0], [0, 0], [2], [0, 4]]
    proposer = MedusaProposer(heads, max_requests=3, choices=choices)
    assert (proposer.num_nodes, proposer.max_depth) == (4, 2)
    context = step(torch.randn(2, 256, generator=rng))
    best = heads(context.hidden).topk(5, 2).indices
    for budget, count in ((None, 4), (3, 3), (0, 0)):
        context.budget = budget
        tree = proposer.propose(context)
        tree.validate()
        for b in range(2):
            expected = [tuple(int(best[b, d, r]) for d, r in enumerate(path)) for path in choices[:count]]
            assert paths(tree, b) == expected
        assert (tree.gain > 0).tolist() == [count > 0] * 2


def test_trees_come_from_the_heads_and_follow_the_budget(rng):
    weights = {k: v.float() for k, v in load_file(HEADS).items()}
    heads = MedusaHeads(weights.items(), 4, 4096, CPU, torch.float32)
    proposer = MedusaProposer(heads, max_requests=3, nodes=12, min_chance=0.0)
    assert (proposer.num_nodes, proposer.max_depth) == (12, 4)
    hidden = torch.randn(2, 256, generator=rng)
    context = step(hidden)
    tree = proposer.propose(context)
    tree.validate()
    assert tree.num_nodes.tolist() == [12, 12]
    first = heads(hidden)[:, 0].argmax(1)
    assert tree.tokens[:, 0].tolist() == first.tolist()
    context.budget = 3
    assert proposer.propose(context).num_nodes.tolist() == [3, 3]
    strict = MedusaProposer(heads, max_requests=3, nodes=12, min_chance=0.99)
    assert strict.propose(context).num_nodes.tolist() == [0, 0]


def test_a_head_that_is_surer_than_usual_gives_its_candidates_a_larger_chance(rng):
    flat, sharp = torch.zeros(2, 40), torch.zeros(2, 40)
    sharp[:, 7] = 6.0
    proposer = MedusaProposer(None, max_requests=2, nodes=6, depth=2, min_chance=0.0)

    def gain(*logits):
        proposer.heads = lambda hidden: torch.stack(logits)
        batch = len(logits)
        context = StepContext(
            slots=torch.arange(batch),
            token_ids=torch.zeros(2, 20, dtype=torch.int32),
            lengths=torch.full((batch,), 5),
            max_length=5,
            num_emitted=torch.zeros(batch, dtype=torch.int32),
            hidden=torch.zeros(batch, 4),
            likeliest=lambda logits, request, place, count: logits.topk(count, 1)[::-1],
        )
        return proposer.propose(context).gain

    for _ in range(100):
        usual = gain(flat, flat)
    surer = gain(flat, sharp)
    assert float(surer[0]) == pytest.approx(float(usual[0]), rel=0.05)
    assert float(surer[1]) > 1.5 * float(surer[0])
