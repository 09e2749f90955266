# SPDX-License-Identifier: Apache-2.0
"""Tables and gates that are made from recorded text, and their files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.layers.signals import HIDDEN, signals
from vllm_spec_plugins.layers.exits import policy
from vllm_spec_plugins.layers.recorded_exits import Gate, Hash

EXITS, LAYERS, VOCAB = (2, 4, 6), 8, 20


def text(rng: torch.Generator, length: int = 3000) -> torch.Tensor:
    """[length] int64, tokens below 15 with very different frequencies."""
    return (15 * torch.rand(length, generator=rng) ** 3).long()


def test_the_most_frequent_tokens_leave_first_with_the_share_that_is_asked_for(rng: torch.Generator) -> None:
    tokens = text(rng)
    layers = Hash.by_frequency(tokens, EXITS, (0.5, 0.2, 0.2), VOCAB, LAYERS).layers.tolist()
    count = Counter(tokens.tolist())
    ordered = sorted(count, key=lambda token: (-count[token], token))
    depths = [layers[token] for token in ordered]
    assert depths == sorted(depths)
    assert set(layers[15:]) == {LAYERS}
    seen = 0
    for token in ordered:  # a token leaves where the text before it, in this order, has not used a share up
        share = seen / len(tokens)
        assert layers[token] == (2 if share < 0.5 else 4 if share < 0.7 else 6 if share < 0.9 else 8)
        seen += count[token]


def test_a_token_leaves_at_the_first_exit_that_agrees_often_enough(rng: torch.Generator) -> None:
    tokens = text(rng)
    agreed = torch.rand(len(tokens), 3, generator=rng) < torch.tensor([0.4, 0.6, 0.9]) - 0.02 * tokens.unsqueeze(1)
    for least in (0.0, 0.35, 0.55, 0.8, 1.01):
        layers = Hash.by_agreement(tokens, agreed, EXITS, least, VOCAB, LAYERS, prior=4.0).layers
        for token in range(VOCAB):
            here = agreed[tokens == token].double()
            shares = (here.sum(0) + 4.0 * agreed.double().mean(0)) / (len(here) + 4.0)
            expected = next((e for e, share in zip(EXITS, shares, strict=True) if share >= least), LAYERS)
            assert layers[token] == expected, (least, token)
    assert Hash.by_agreement(tokens, agreed, EXITS, 0.0, VOCAB, LAYERS).layers.tolist() == [2] * VOCAB
    assert Hash.by_agreement(tokens, agreed, EXITS, 1.01, VOCAB, LAYERS).layers.tolist() == [LAYERS] * VOCAB


def test_a_gate_learns_what_the_hidden_state_tells(rng: torch.Generator) -> None:
    """Two exits whose answers are right by different directions, with noise; judged on rows that it was not trained on."""
    directions = torch.randn(2, HIDDEN, generator=rng)
    hidden = torch.randn(2, 6000, HIDDEN, generator=rng) * torch.tensor([1.0, 30.0]).view(2, 1, 1)
    unit = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    chance = torch.sigmoid((unit @ directions.unsqueeze(2)).squeeze(2) + 0.5)
    agreed = torch.rand(2, 6000, generator=rng) < chance
    gate = Gate.train(
        {layer: (hidden[i, :4000], agreed[i, :4000]) for i, layer in enumerate((2, 5))}, 0.5, penalty=1e-4
    )
    for i, layer in enumerate((2, 5)):
        rest = replace(signals(2000, rng), layer=layer, hidden=hidden[i, 4000:])
        assert (gate.score(rest) - chance[i, 4000:]).abs().mean() < 0.05
        assert torch.corrcoef(torch.stack((gate.weight[i], directions[i])))[0, 1] > 0.98
    with pytest.raises(ValueError, match="has no gate after layer 4; it has them after 2, 5"):
        gate.score(signals(1, rng, layer=4))


def test_training_is_at_the_minimum_and_repeats_itself(rng: torch.Generator) -> None:
    hidden = torch.randn(500, HIDDEN, generator=rng)
    agreed = torch.rand(500, generator=rng) < 0.7
    gate = Gate.train({2: (hidden, agreed)}, 0.5, penalty=0.01)
    again = Gate.train({2: (hidden, agreed)}, 0.5, penalty=0.01)
    assert torch.equal(gate.weight, again.weight) and torch.equal(gate.bias, again.bias)
    unit = (hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()).double()
    wrong = torch.sigmoid(unit @ gate.weight[0].double() + gate.bias[0].double()) - agreed.double()
    assert ((unit * wrong.unsqueeze(1)).mean(0) + 0.01 * gate.weight[0].double()).abs().max() < 1e-4
    assert abs(wrong.mean().item()) < 1e-4  # the bias is not penalised: the mean chance is the share


def test_files_give_back_what_was_saved(rng: torch.Generator, tmp_path: Path) -> None:
    table = Hash(0.0, torch.randint(1, 9, (VOCAB,), generator=rng).to(torch.int16))
    gate = Gate(0.5, (2, 6), torch.randn(2, HIDDEN, generator=rng), torch.randn(2, generator=rng))
    table.save(tmp_path / "table")
    gate.save(tmp_path / "gate")
    read_table, read_gate = policy(f"hash:{tmp_path}/table"), policy(f"gate:{tmp_path}/gate:0.25")
    assert isinstance(read_table, Hash) and isinstance(read_gate, Gate)
    assert torch.equal(read_table.layers, table.layers)
    assert (read_gate.exits, read_gate.bound) == ((2, 6), 0.25)
    assert torch.equal(read_gate.weight, gate.weight) and torch.equal(read_gate.bias, gate.bias)
    given = signals(30, rng, VOCAB, layer=6)
    assert torch.equal(read_gate.score(given), gate.score(given))
    assert torch.equal(read_table.good(given), table.good(given))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("layers")
    with pytest.raises(ValueError, match="which is no readable safetensors file"):
        policy(f"hash:{file}")
    with pytest.raises(ValueError, match="which is no readable safetensors file"):
        policy(f"hash:{tmp_path}")
    save_file({"weight": torch.zeros(2, 3)}, file)
    with pytest.raises(ValueError, match=r"which holds weight \[2, 3\]; valid are layers of Hash.save$"):
        policy(f"hash:{file}")
    with pytest.raises(ValueError, match=r"which holds weight \[2, 3\]; valid are exits, weight, bias of Gate.save$"):
        policy(f"gate:{file}:0.5")
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "exits": torch.tensor([2])}, file)
    with pytest.raises(ValueError, match="different numbers of exits, weights and biases"):
        policy(f"gate:{file}:0.5")
    save_file({"layers": torch.tensor([1, 0, 2])}, file)
    with pytest.raises(ValueError, match="sends tokens out before the first layer"):
        policy(f"hash:{file}")


def test_what_was_made_for_another_model_is_refused() -> None:
    table = Hash(0.0, torch.full((VOCAB,), 2, dtype=torch.int16), "T")
    table.check(EXITS, VOCAB, HIDDEN)
    with pytest.raises(
        ValueError, match=r"^hash:T has exits for 20 tokens, and the model has 21; build it for this model$"
    ):
        table.check(EXITS, VOCAB + 1, HIDDEN)
    gate = Gate(0.5, (2, 4, 6), torch.zeros(3, HIDDEN), torch.zeros(3), "G")
    gate.check(EXITS, VOCAB, HIDDEN)
    gate.check((4,), VOCAB, HIDDEN)
    with pytest.raises(ValueError, match=r"^gate:G:0\.5 reads 16 hidden channels, and the model has 8; train it"):
        gate.check(EXITS, VOCAB, 8)
    with pytest.raises(ValueError, match=r"^gate:G:0\.5 has no gate after layer 3; it has them after 2, 4, 6$"):
        gate.check((2, 3), VOCAB, HIDDEN)
